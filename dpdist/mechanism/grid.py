"""The grid of a private sum: what a step releases is an integer vector, times a public power of two.

The float32 sum of one product (a microbatch on a device) is rounded to multiples of the spacing g. From there to the
noise all is integer addition, which is exact in any order, so float32 accumulation is nothing to assume, and the sum is
the same however many devices add it up. Division by B, the optimizer and float32 come after the noise: post-processing.

Sensitivity. Taking one example out changes at most two products (`sampling.in_random_order`), by at most C together.
Each of their four roundings, two before and two after, is off by at most half a unit, so the integer sums differ by at
most C + 2 g sqrt(d) = C (1 + slack) over d coordinates: the noise is sigma times *that*, and sigma is exactly what the
accountant is given. What this does not cover is float32 rounding within the two products; see docs/rounding.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int64

#: The noise has a standard deviation of so many grid units, or more; fewer only where 7e7 records and more must fit.
_UNITS_IN_NOISE = 2.0**36
_SLACK = 2.0**-12
_LARGEST_SLACK = 1e-3
_RANGE = 2.0**62  # of int64, halved, so that no sum with its noise leaves it
_FARTHEST = 16  # standard deviations: no draw of `noise` is that far out


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The public grid of an incarnation's sums."""

    #: g, a power of two.
    spacing: float
    #: rho: one example moves the integer sum by at most C (1 + rho).
    slack: float


def choose_grid(*, clip_norm: float, noise_multiplier: float, coordinates: int, dataset_size: int) -> Grid:
    """The coarsest grid whose slack is negligible: at most 2^-12, and rarely over 1e-6.

    Args:
        clip_norm: C.
        noise_multiplier: sigma.
        coordinates: d, the number of parameters that train.
        dataset_size: N; a sum of so many clipped gradients, and its noise, fit into 62 bits.

    Raises:
        ValueError: no such grid exists, for N or d beyond anything that fits a machine.
    """
    wanted = min(noise_multiplier * clip_norm / _UNITS_IN_NOISE, clip_norm * _SLACK / (2 * math.sqrt(coordinates)))
    least = (dataset_size + 2 * _FARTHEST * noise_multiplier) * clip_norm / _RANGE
    spacing = max(2.0 ** math.floor(math.log2(wanted)), 2.0 ** math.ceil(math.log2(least)))
    slack = 2 * spacing * math.sqrt(coordinates) / clip_norm
    if slack > _LARGEST_SLACK:
        raise ValueError(
            f"{dataset_size} examples, {coordinates} parameters and noise_multiplier={noise_multiplier:g} leave no "
            "grid that 64-bit integers can hold"
        )
    return Grid(spacing=spacing, slack=slack * (1 + 2.0**-50))


def to_grid(values: Float32[Array, " d"], spacing: float) -> Int64[Array, " d"]:
    """Round to multiples of `spacing`, given as integers. Trace it where 64-bit types are enabled."""
    return jnp.round(values.astype(jnp.float64) / spacing).astype(jnp.int64)
