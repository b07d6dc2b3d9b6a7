"""The one draw of Gaussian noise in a step: integers, in units of the grid, drawn by one device in its own program.

Each coordinate is round(Z1) + round(Z2) + round(Z3) of independent normals: Z1 and Z2 have half of the variance each,
and Z3 a standard deviation of 2^20 units, which is next to nothing. In law, round(Z1) + round(Z2) added to an integer S
is round(S + Z + U) with Z normal and U uniform in [-1/2, 1/2], up to e^(-pi^2 s^2 / 2) for Z's standard deviation of s
units: post-processing of the exact Gaussian mechanism. So every integer in range can come out, with the right
probability, whatever S is. That is not so where (each was tried, and can be told from a Gaussian)
- a float32 draw is multiplied by its scale: up to 14% of the float32 numbers can then not come out at all;
- one float64 draw is rounded: beyond 4.5 standard deviations it leaves grid points out;
- a float64 sum of two is rounded once: it ties to even.

A float64 normal takes fewer than 2^53 values, none beyond 8.3 standard deviations. That two of them, rounded, fill the
grid evenly is a heuristic (to a relative error of about 2^-33), which the third, with steps of its own, makes safer; so
is that what an ideal normal does beyond there, with a probability of 2^-53 a draw, is never seen.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64, UInt32

_THIRD = 2.0**20  # standard deviation, in units


def block_size(coordinates: int) -> int:
    """How many coordinates share a block, which has keys of its own; a power of two that depends on nothing else."""
    return 1 << min(20, max(12, (coordinates // 64).bit_length()))


def integer_noise(keys: UInt32[Array | np.ndarray, "blocks 3 2"], coordinates: int, units: float) -> Int64[Array, " d"]:
    """Draw noise for `coordinates` coordinates. Trace it where 64-bit types are enabled.

    Args:
        keys: the Threefry keys of every block's three draws, see `Keys.noise`.
        coordinates: d.
        units: the standard deviation, in units of the grid.

    Raises:
        TypeError: 64-bit types are not enabled.
    """
    if jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:  # JAX would draw float32 in their place
        raise TypeError("the noise must be drawn in float64")
    block = partial(_block, size=block_size(coordinates), half=units / math.sqrt(2) * (1 + 2.0**-50))
    return jax.lax.map(block, jnp.asarray(keys)).reshape(-1)[:coordinates]


def _block(keys: UInt32[Array, "3 2"], *, size: int, half: float) -> Int64[Array, " n"]:
    total = jnp.zeros(size, jnp.int64)
    for key, deviation in zip(keys, (half, half, _THIRD), strict=True):
        z = jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), (size,), jnp.float64)
        total += jnp.round(z * deviation).astype(jnp.int64)
    return total
