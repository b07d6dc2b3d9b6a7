"""Sums of clipped per-example gradients, for any JAX loss of one example.

Reading order: `per_example` (the reference) and `weights`; then `flatten`, `graph`, `view`, `factors`, `norms`,
`strategy` and `bookkeeping`, which compute the same sums without storing the gradient of every example, and
`tensor_products` and `tensor_cores`, which do so in a short format. `separate` keeps one example from seeing another in
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.mechanism.clipping.bookkeeping import bookkeeping_grad_sum
from dpdist.mechanism.clipping.per_example import per_example_grad_sum
from dpdist.mechanism.clipping.separate import UnsupportedLossError
from dpdist.mechanism.clipping.strategy import LeafStrategy, Preference, smaller, strategies_of

#: f(params, batch, mask) -> (sums, norms); see `clipped_grad_sum`.
GradSum = Callable[[Any, Any, Any], tuple[Any, Any]]
METHODS = ("auto", "per_example", "ghost", "bookkeeping")
PRECISIONS = ("highest", "tensor")

__all__ = [
    "METHODS",
    "PRECISIONS",
    "GradSum",
    "LeafStrategy",
    "Preference",
    "UnsupportedLossError",
    "clipped_grad_sum",
    "in_parts",
]


def clipped_grad_sum(
    loss_fn: Callable[[Any, Any], Any],
    *,
    clip_norm: float,
    method: str = "auto",
    precision: str = "highest",
    prefer: Preference = smaller,
    strategies: Mapping[str, str] | None = None,
    frozen: Collection[str] = frozenset(),
) -> GradSum:
    """Make the function that sums per-example gradients, each clipped to L2 norm `clip_norm`.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`, of *one* example, so that no layer can mix examples.
        clip_norm: C, between 1e-6 and 1e6, the bound on the norm over all parameters together.
        method: how the sum is computed; it is the same sum in all four. `per_example`: the reference, `vmap` of
            `grad`. `bookkeeping`: one forward and one backward pass; each parameter's gradient norm is computed by the
            strategy that needs less memory. `ghost`: the same with two forward and backward passes and less stored
            in between. `auto`: as `bookkeeping`, with the strategy that `prefer` chooses.
        precision: `highest`: norms from factors in float64, sums in float32. `tensor`: both from factors in bfloat16,
            where the loss computes in it, or TF32, on tensor cores: faster on GPUs that have them, and a little less
            than C is added, by what rounding may lose (`tensor_cores`). `per_example` has no factors, so is not
            affected; `ghost` runs one pass with `tensor`.
        prefer: chooses for `auto`, by memory unless given; `program.device_rates` has one that chooses by time.
        strategies: `ghost` or `instantiate` by parameter path (`layers/0/kernel`; `*` matches anything); overrides
            the method's choice. Not for `per_example`.
        frozen: paths of parameters that do not train; no norm and no gradient is computed for them.

    Returns:
        `f(params, batch, mask) -> (sums, norms)`. `batch` is a pytree whose leaves have leading axis p; `mask`
        is float[p], 0 for padding. `sums` is float32 with the structure of params, None where frozen: the sum over i
        of min(1, C / |g_i|) g_i (Abadi et al. 2016, Algorithm 1). `norms` is float32[p], |g_i| before clipping; the
        privacy guarantee does not cover it. An example that is masked, or whose gradient is not finite, adds exactly 0.
        `f` is not to be differentiated: what is rounded to be summed has no derivative.

    Raises:
        ValueError: clip_norm is out of range, the method or the precision unknown; when `f` is called, also if a
            strategy is unknown or a pattern matches no parameter.
        UnsupportedLossError: when `f` is called or traced: the loss is not a scalar, a parameter is complex, or an
            operation could let one example see another; the message names that equation and its source line. Where
            JAX lacks a derivative that is needed, its own error comes, which `program.diagnosis` explains.
    """
    if not 1e-6 <= clip_norm <= 1e6:  # beyond, squares of float32 gradients under- or overflow and C bounds nothing
        raise ValueError(f"clip_norm must be positive, between 1e-6 and 1e6, not {clip_norm!r}")
    if method not in METHODS:
        raise ValueError(f"unknown clipping method {method!r}; there are {', '.join(METHODS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {' and '.join(PRECISIONS)}")
    if method == "per_example":
        return per_example_grad_sum(loss_fn, clip_norm=clip_norm, frozen=frozen)
    prefer = prefer if method == "auto" else smaller
    two_passes, tensor = method == "ghost", precision == "tensor"
    choose = partial(strategies_of, prefer=prefer, overrides=strategies or {})
    return bookkeeping_grad_sum(loss_fn, clip_norm, choose, two_passes=two_passes, tensor=tensor, frozen=frozen)


def in_parts(grad_sum: GradSum, examples: int) -> GradSum:
    """Return `grad_sum` of so many examples at a time, added up in float32: what these few hand on stays in caches.

    The weight of an example depends on its own gradient alone, so it is the same sum but for rounding, and a bound on
    the rounding of a sum in any order holds for this order too. `examples` must divide the batch.
    """

    def sum_of_parts(params: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
        parts = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, examples, *x.shape[1:]), (batch, mask))

        def add(sums: Any, part: tuple[Any, Any]) -> tuple[Any, Any]:
            found, norms = grad_sum(params, *part)
            return jax.tree.map(jnp.add, sums, found), norms

        shapes, _ = jax.eval_shape(grad_sum, params, *jax.tree.map(lambda x: x[0], parts))
        sums, norms = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
        return sums, norms.reshape(-1)

    return sum_of_parts
