"""Compute every example's clipping weight from its gradient norm, for all methods, and sum stored gradients with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Float64

#: Norms are increased by this fraction before clipping, so that no rounding makes an example add more than C. With
#: u = 2^-24 and v = 2^-53, and whatever the order of summation, to first order and relative to the norm:
#: * a square of float32 is exact in float64, and a sum of n of them errs by n v, its root by n v / 2 (Higham 2002,
#:   section 4.2): 2^-20 for n = 2^34 entries of all parameters together, the most that this margin is for;
#: * the root, the product with 1 + NORM_MARGIN and the division, in float64: 2 v each;
#: * the weight's conversion to float32: u;
#: * its product with each entry of the gradient: u, and what is added for other examples is exactly 0. Below 2^-126 the
#:   error is absolute instead, at most 2^-149 an entry: of 2^34 entries 2^-132, against C >= 2^-20.
#: That is 2^-20 + 2^-23 + 2^-50 in all, so 2^-19 leaves almost half of it for products that lose more than u.
NORM_MARGIN = 2.0**-19


def rounded_float32(x: Array) -> Array:
    """Return x in float32 if its format is shorter, rounded to its precision by an operation that XLA keeps.

    A pair of casts, float32 -> bfloat16 -> float32, rounds nothing on GPUs: XLA drops it (seen on an H100, see
    docs/results/gpu-h100). A norm in float64 would then be that of rounded factors and the sum one of unrounded
    factors, and a clipped gradient could be longer than C. Other dtypes are returned unchanged.
    """
    if not is_short(x.dtype):
        return x
    # float32's exponents: with float16's own, `reduce_precision` would flush subnormal numbers to 0.
    return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=int(jnp.finfo(x.dtype).nmant))


def is_short(dtype: Any) -> bool:
    """Return whether `dtype` is a floating-point format of less than 32 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def squares(gradients: Float[Array, "p ..."]) -> Float64[Array, " p"]:
    """Return every example's squared norm in float64: XLA converts within the sum and stores no copy."""
    with jax.enable_x64(True):
        return jnp.sum(jnp.square(gradients.reshape(gradients.shape[0], -1).astype(jnp.float64)), axis=1)


def largest_terms(rows: int) -> float:
    """Return r: a weight is also capped so that c R <= r C, where R sums an example's terms by magnitude.

    Else nothing would limit what an example whose terms cancel does to the rounding of the others in its product
    (docs/rounding.md). R is about sqrt(rows) norms where rows are independent, so that this caps no ordinary example.
    """
    return max(16.0, 2 * math.sqrt(rows))


class Norms(NamedTuple):
    """Squares of norms over all parameters of each example: float64[p] each, which add up over parameters."""

    #: |g|^2, as computed.
    computed: Float64[Array, " p"]
    #: An example with weight c adds at most c sqrt(relative) + sqrt(absolute) to the weighted sum.
    relative: Float64[Array, " p"]
    absolute: Float64[Array, " p"]
    #: R^2: R bounds the sum of magnitudes of all the terms that the products behind g add up.
    terms: Float64[Array, " p"]

    def __add__(self, other: Norms) -> Norms:  # type: ignore[override]
        """Return the sums of fields."""
        with jax.enable_x64(True):
            return Norms(*(x + y for x, y in zip(self, other, strict=True)))


def norms_of_gradients(gradients: Sequence[Float[Array, "p ..."]], examples: int) -> Norms:
    """Return the norms of stored gradients, which are summed as they are."""
    with jax.enable_x64(True):
        total = sum(map(squares, gradients), jnp.zeros(examples))
        return Norms(total, total, jnp.zeros(examples), total)


def norms_of(squares: Float64[Array, " p"]) -> Float32[Array, " p"]:
    """Return the root of float64 squares, infinite where they are beyond float32."""
    return jnp.sqrt(squares.astype(jnp.float32))


def weigh(
    norms: Norms, mask: Float[Array | np.ndarray, " p"], clip_norm: float, rows: int = 1
) -> tuple[Float32[Array, " p"], Bool[Array, " p"]]:
    """Return every example's weight, min(1, C / norm) or a little less, and whether it is used.

    An example is used if it is not masked and its norm is finite; an unused one has weight 0. A gradient whose square
    is beyond float32 has an infinite norm, so it is dropped: its weight would be too small to be exact.

    Args:
        rows: the most rows that an example has in a product.
    """
    used = jnp.asarray(mask > 0) & jnp.isfinite(norms_of(norms.relative))
    with jax.enable_x64(True):
        least = clip_norm * 1e-6
        bounds = jnp.maximum(jnp.sqrt(norms.relative) * (1 + NORM_MARGIN), least)
        capped = largest_terms(rows) * clip_norm / jnp.maximum(jnp.sqrt(norms.terms), least)
        room = jnp.maximum(clip_norm - jnp.sqrt(norms.absolute), 0.0)
        scale = jnp.minimum(jnp.minimum(1.0, room / bounds), capped).astype(jnp.float32)
    return jnp.where(used, scale, 0.0), used


def weighted_sum(
    scale: Float32[Array, " p"], used: Bool[Array, " p"], gradients: Float[Array, "p ..."]
) -> Float32[Array, "..."]:
    """Return sum_i scale[i] gradients[i] in float32.

    One product runs 1.3 to 1.7 times faster than scaling each gradient first. Unused examples are replaced by 0 with
    `where` in both operands: 0 * NaN is NaN, so a weight of 0 would not remove them.
    """
    flat = gradients.reshape(gradients.shape[0], -1).astype(jnp.float32)
    kept = jnp.where(used[:, None], flat, 0.0)
    return jnp.tensordot(scale, kept, axes=1, precision=lax.Precision.HIGHEST).reshape(gradients.shape[1:])
