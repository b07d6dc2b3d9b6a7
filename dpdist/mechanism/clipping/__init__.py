"""Clipped gradient sums of any one-example JAX loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpdist.mechanism.clipping.per_example import per_example_grad_sum
from dpdist.mechanism.clipping.plain import plain_grad_sum

#: f(params, batch, mask) -> (sums, norms); see `clipped_grad_sum`.
GradSum = Callable[[Any, Any, Any], tuple[Any, Any]]

__all__ = ["GradSum", "clipped_grad_sum", "plain_grad_sum"]


def clipped_grad_sum(loss_fn: Callable[[Any, Any], Any], *, clip_norm: float, method: str = "auto") -> GradSum:
    """A function that sums per-example gradients, each clipped to L2 norm `clip_norm`.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`, of *one* example, so that no layer can mix examples.
        clip_norm: C, between 1e-6 and 1e6, over all parameters together.
        method: how the same sum is computed: `per_example` (the reference, `vmap` of `grad`); `auto` is the
            cheapest there is, today `per_example`.

    Returns:
        `f(params, batch, mask) -> (sums, norms)`. `batch` is a pytree whose leaves have leading axis p, `mask`
        is float[p], 0 for padding. `sums` is float32 with the structure of params: the sum over i
        of min(1, C / |g_i|) g_i (Abadi et al. 2016, Algorithm 1). `norms` is float32[p], |g_i| before
        clipping; it is not private. An example that is masked, or whose gradient is not finite,
        adds exactly 0.

    Raises:
        ValueError: unknown method or a clip_norm out of range.
    """
    if not 1e-6 <= clip_norm <= 1e6:  # beyond, squares of float32 gradients under- or overflow and C bounds nothing
        raise ValueError(f"clip_norm must be positive, between 1e-6 and 1e6, not {clip_norm!r}")
    if method not in ("auto", "per_example"):
        raise ValueError(f"unknown clipping method {method!r}; there are auto and per_example")
    return per_example_grad_sum(loss_fn, clip_norm=clip_norm)
