"""The one draw of Gaussian noise in a step, compiled as a program of its own that one device runs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt32


def gaussian_draw(
    keys: UInt32[Array | np.ndarray, "leaves 4 2"], sizes: Sequence[int], scale: float
) -> Float32[Array, " d"]:
    """Draw noise of standard deviation `scale` (= sigma * C) for leaves of the given sizes, concatenated.

    JAX's float32 normal takes only 2^23 values and stops at 5.42 standard deviations, so an observer could exclude
    some sums. Each coordinate is therefore (z1 + z2 + z3 + z4) / 2 of four independent draws: exactly N(0, 1) if the
    draws were ideal, and on a far finer grid with these (Holohan and Braghin, "Secure Random Sampling in Differential
    Privacy", ESORICS 2021). The result is still float32 and so takes finitely many values; the privacy statement
    names that as an assumption.

    Args:
        keys: the four draws' threefry keys of every leaf, see `Keys.noise`.
        sizes: the number of coordinates of every leaf; they add up to d.
        scale: sigma * C.
    """

    def leaf_draw(leaf_keys: UInt32[Array | np.ndarray, "4 2"], size: int) -> Float32[Array, " n"]:
        z = [
            jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), (size,), jnp.float32)
            for key in leaf_keys
        ]
        return (z[0] + z[1] + z[2] + z[3]) * 0.5

    return jnp.concatenate([leaf_draw(keys[i], size) for i, size in enumerate(sizes)]) * jnp.float32(scale)
