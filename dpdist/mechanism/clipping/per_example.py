"""The reference method: materialise every example's gradient, clip, sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

# Norms are inflated by this much before clipping, so that the float32 rounding of the norm (XLA sums in
# blocks, so its relative error stays near 1e-6 even for 1e8 parameters) and of the product
# cannot let an example contribute more than C.
NORM_MARGIN = 8e-6


def per_example_grad_sum(
    loss_fn: Callable[[Any, Any], Any], *, clip_norm: float
) -> Callable[[Any, Any, Any], tuple[Any, Float32[Array, " p"]]]:
    """See `clipped_grad_sum`. Costs p times the parameters in memory, 12 bytes a parameter and example.

    The weighted sum is one `tensordot` with the clipping coefficients, which runs 1.3 to 1.7 times
    faster than scaling each gradient first.
    """

    def clipped_sum(params: Any, batch: Any, mask: Float[Array, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        grads = jax.tree.map(lambda g: g.reshape(g.shape[0], -1).astype(jnp.float32), grads)
        squared = sum((jnp.sum(g * g, axis=1) for g in jax.tree.leaves(grads)), jnp.zeros(mask.shape))
        norms = jnp.sqrt(squared)
        # A gradient so large that its square overflows counts as not finite: dropped, never unbounded.
        used = (mask > 0) & jnp.isfinite(norms)
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norms * (1 + NORM_MARGIN), clip_norm * 1e-6))
        scale = jnp.where(used, scale, 0.0)

        def weighted(g: Float32[Array, "p n"], like: Array) -> Array:
            # Select on both operands: 0 * NaN is NaN, so a zero weight alone removes nothing.
            kept = jnp.where(used[:, None], g, 0.0)
            return jnp.tensordot(scale, kept, axes=1, precision=lax.Precision.HIGHEST).reshape(like.shape)

        return jax.tree.map(weighted, grads, params), norms

    return clipped_sum
