"""Clipped gradient sums of any one-example JAX loss.

Reading order: `per_example` (the reference), `weights`; then `graph`, `view`, `factors`, `norms`, `strategy`,
`bookkeeping`, which compute the same sums without every example's gradient. `diagnosis` says where they can't.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from dpdist.mechanism.clipping.bookkeeping import bookkeeping_grad_sum
from dpdist.mechanism.clipping.graph import UnsupportedLossError, trace
from dpdist.mechanism.clipping.paths import matching, paths_of, trainable, with_frozen
from dpdist.mechanism.clipping.per_example import per_example_grad_sum
from dpdist.mechanism.clipping.plain import plain_grad_sum
from dpdist.mechanism.clipping.strategy import DeviceRates, LeafStrategy, cheaper, plan_leaves, smaller

#: f(params, batch, mask) -> (sums, norms); see `clipped_grad_sum`.
GradSum = Callable[[Any, Any, Any], tuple[Any, Any]]
METHODS = ("auto", "per_example", "ghost", "bookkeeping")
#: Two CPU cores of 2024, for which no rates are given.
TWO_CORES = DeviceRates(flops_float64=4e10, bandwidth=1e10)

__all__ = [
    "METHODS",
    "TWO_CORES",
    "GradSum",
    "LeafPlan",
    "Machine",
    "UnsupportedLossError",
    "clipped_grad_sum",
    "matching",
    "paths_of",
    "plain_grad_sum",
    "plan_clipping",
    "trainable",
    "with_frozen",
]


def clipped_grad_sum(
    loss_fn: Callable[[Any, Any], Any],
    *,
    clip_norm: float,
    method: str = "auto",
    rates: DeviceRates = TWO_CORES,
    strategies: Mapping[str, str] | None = None,
    frozen: Collection[str] = frozenset(),
) -> GradSum:
    """A function that sums per-example gradients, each clipped to L2 norm `clip_norm`.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`, of *one* example, so that no layer can mix examples.
        clip_norm: C, between 1e-6 and 1e6, over all parameters together.
        method: how the same sum is computed. `per_example`: the reference, `vmap` of `grad`. `bookkeeping`: one
            forward and one backward pass, each parameter's norm in the way that needs less memory. `ghost`: the same
            with the passes made twice and less kept between them. `auto`: as `bookkeeping`, each parameter's norm in
            the way that is faster on `rates`.
        rates: the device's rates, for `auto`.
        strategies: `ghost` or `instantiate` by parameter path (`layers/0/kernel`; `*` matches anything), instead of
            what the method would choose; not for `per_example`.
        frozen: paths of parameters that do not train: they cost no norm and no gradient.

    Returns:
        `f(params, batch, mask) -> (sums, norms)`. `batch` is a pytree whose leaves have leading axis p, `mask`
        is float[p], 0 for padding. `sums` is float32 with the structure of params, None where frozen: the sum over i
        of min(1, C / |g_i|) g_i (Abadi et al. 2016, Algorithm 1). `norms` is float32[p], |g_i| before
        clipping; it is not private. An example that is masked, or whose gradient is not finite,
        adds exactly 0.

    Raises:
        ValueError: unknown method or strategy, a pattern that matches no parameter (both when `f` is called), or a
            clip_norm out of range.
        UnsupportedLossError: when `f` is called or traced: the loss is no scalar, a parameter is complex, or a
            derivative that is needed does not exist; then it names the equation, its line and the parameters behind it.
    """
    if not 1e-6 <= clip_norm <= 1e6:  # beyond, squares of float32 gradients under- or overflow and C bounds nothing
        raise ValueError(f"clip_norm must be positive, between 1e-6 and 1e6, not {clip_norm!r}")
    if method not in METHODS:
        raise ValueError(f"unknown clipping method {method!r}; there are {', '.join(METHODS)}")
    if method == "per_example":
        return per_example_grad_sum(loss_fn, clip_norm=clip_norm, frozen=frozen)
    choose = cheaper(rates) if method == "auto" else smaller
    return bookkeeping_grad_sum(
        loss_fn,
        clip_norm=clip_norm,
        assigner=lambda graph, params: plan_leaves(graph, params, choose, strategies or {}),
        twice=method == "ghost",
        frozen=frozen,
    )


def choose_strategies(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    example: Any,
    *,
    method: str = "auto",
    rates: DeviceRates = TWO_CORES,
    strategies: Mapping[str, str] | None = None,
    frozen: Collection[str] = frozenset(),
) -> list[LeafStrategy]:
    """What `clipped_grad_sum` does for each parameter that trains, from the shapes of `params` and of one `example`."""
    choose = cheaper(rates) if method == "auto" else smaller
    params, example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, example))
    plans, _ = plan_leaves(trace(loss_fn, params, example, frozen), params, choose, strategies or {})
    return [plan for plan in plans if plan.path not in frozen]
