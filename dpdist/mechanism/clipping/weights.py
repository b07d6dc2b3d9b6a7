"""From norms to the weight of every example: what bounds a contribution, the same for all methods."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

# Norms are inflated by this much before clipping, so that the float32 rounding of the norm (XLA sums in
# blocks, so its relative error stays near 1e-6 even for 1e8 parameters) and of the product
# cannot let an example contribute more than C.
NORM_MARGIN = 8e-6


def weigh(
    norms: Float32[Array, " p"], mask: Float[Array | np.ndarray, " p"], clip_norm: float
) -> tuple[Float32[Array, " p"], Bool[Array, " p"]]:
    """(min(1, C / norm), 0 where an example counts for nothing; whether it counts).

    A gradient so large that its square overflows counts as not finite: it is dropped, never unbounded.
    """
    used = jnp.asarray(mask > 0) & jnp.isfinite(norms)
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norms * (1 + NORM_MARGIN), clip_norm * 1e-6))
    return jnp.where(used, scale, 0.0), used


def weighted_sum(
    scale: Float32[Array, " p"], used: Bool[Array, " p"], gradients: Float[Array, "p ..."]
) -> Float32[Array, "..."]:
    """sum_i scale[i] gradients[i] in float32.

    As one product it runs 1.3 to 1.7 times faster than scaling each gradient first. Examples that do not count are
    selected away on both operands: 0 * NaN is NaN, so a zero weight alone removes nothing.
    """
    flat = gradients.reshape(gradients.shape[0], -1).astype(jnp.float32)
    kept = jnp.where(used[:, None], flat, 0.0)
    return jnp.tensordot(scale, kept, axes=1, precision=lax.Precision.HIGHEST).reshape(gradients.shape[1:])
