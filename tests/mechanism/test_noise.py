"""The integer noise: Gaussian by several tests down to its lowest bits, and a function of its keys alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.noise import block_size, integer_noise

KEYS = Keys(Secret.from_insecure_seed(11), b"noise tests")
COORDINATES = 2**20
BLOCKS = COORDINATES // block_size(COORDINATES)
ALPHA = 1e-5
#: The standard deviation in units of the grid: at least 2^36 in a run. On a finer grid the lowest bits tell more.
UNITS = [mantissa * 2.0**exponent for mantissa in (1.0, 1.25, 1.5, 1.999) for exponent in (36, 46)]
Draw = Callable[[np.ndarray, float], np.ndarray]


@partial(jax.jit, static_argnums=(1, 2))
def compiled(keys: Any, coordinates: int, units: float) -> Any:
    return integer_noise(keys, coordinates, units)


def draw(keys: np.ndarray, units: float, coordinates: int = COORDINATES) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(compiled(keys, coordinates, units))


def normals(keys: np.ndarray, which: int, dtype: Any) -> np.ndarray:
    """One independent normal for every coordinate, from the keys of draw `which`."""
    size = block_size(COORDINATES)
    with jax.enable_x64(True):
        return np.concatenate(
            [jax.random.normal(jax.random.wrap_key_data(k[which], impl="threefry2x32"), (size,), dtype) for k in keys]
        )


# Draws that look like a Gaussian and are none; each was once thought good enough.


def one_float32_draw(keys: np.ndarray, units: float) -> np.ndarray:
    return np.rint((normals(keys, 0, jnp.float32) * np.float32(units)).astype(np.float64)).astype(np.int64)


def one_float64_draw(keys: np.ndarray, units: float) -> np.ndarray:
    return np.rint(normals(keys, 0, jnp.float64) * units).astype(np.int64)


def a_sum_rounded_once(keys: np.ndarray, units: float) -> np.ndarray:
    half = units / math.sqrt(2)
    return np.rint(normals(keys, 0, jnp.float64) * half + normals(keys, 1, jnp.float64) * half).astype(np.int64)


def low_bits_are_even(values: np.ndarray, bits: int = 4) -> bool:
    """Whether the lowest bits of the integers are uniform, as those of a Gaussian that is this wide."""
    counts = np.bincount(values & (2**bits - 1), minlength=2**bits)
    return bool(stats.chisquare(counts).pvalue > ALPHA)


def share_of_one_draw(values: np.ndarray, units: float) -> float:
    """Of the values beyond 4 standard deviations, the share that a single float64 draw can reach at all.

    A float64 normal is sqrt(2) erf_inv(u) for u a multiple of 2^-52; out there, neighbouring u lie many units apart.
    """
    far = values[np.abs(values) > 4 * units].astype(np.float64)
    centre = np.round(special.erf(far / units / math.sqrt(2)) * 2.0**52)
    u = (centre[:, None] + np.arange(-4000, 4001)) * 2.0**-52  # XLA's erf_inv differs by 2e-10 from the true one
    with jax.enable_x64(True):
        reached = np.rint(np.asarray(math.sqrt(2) * jax.lax.erf_inv(np.where(np.abs(u) < 1, u, 0.0))) * units)
    return float((reached == far[:, None]).any(axis=1).mean())


def is_noise(draw: Draw, units: float) -> bool:
    """What an attacker can see in the low bits of many draws, and of many draws added to an odd sum."""
    values = np.concatenate([draw(KEYS.noise(step, BLOCKS), units) for step in range(3)])
    if not low_bits_are_even(values) or not low_bits_are_even(values + 12345):
        return False
    return units < 2**46 or share_of_one_draw(values, units) < 0.5


@pytest.mark.parametrize("units", UNITS)
def test_no_low_bit_tells_noise_from_a_sum_with_noise(units: float) -> None:
    assert is_noise(draw, units)


@pytest.mark.parametrize("wrong", [one_float32_draw, one_float64_draw, a_sum_rounded_once])
def test_draws_that_look_gaussian_and_are_none_are_told_apart(wrong: Draw) -> None:
    """What shows that the test above has power."""
    assert not all(is_noise(wrong, units) for units in UNITS)


# The distribution

SCALE = 1.7 * 2.0**36


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return draw(KEYS.noise(0, BLOCKS), SCALE)


def variance_is(values: np.ndarray, scale: float) -> bool:
    """Return whether the sum of squares lies in the chi-square interval of N(0, scale^2)."""
    statistic = np.sum((values.astype(np.float64) / scale) ** 2)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], values.size)
    return bool(low < statistic < high)


def test_the_standard_deviation_is_the_scale(first: np.ndarray) -> None:
    assert first.dtype == np.int64
    assert first.shape == (COORDINATES,)
    assert variance_is(first, SCALE)
    assert not variance_is(first, SCALE * 1.01)  # the interval is tight enough to reject 1%
    assert abs(first.mean(dtype=np.float64)) < 4.5 * SCALE / np.sqrt(first.size)


def test_the_distribution_is_normal(first: np.ndarray) -> None:
    assert stats.kstest(first / SCALE, "norm").pvalue > ALPHA
    # The tails too: counts beyond 3 and 4 standard deviations on each side.
    for edge in (-4.0, -3.0, 3.0, 4.0):
        beyond = int(np.sum(first / SCALE < edge) if edge < 0 else np.sum(first / SCALE > edge))
        assert stats.binomtest(beyond, first.size, stats.norm.sf(abs(edge))).pvalue > ALPHA


def test_a_draw_is_the_sum_of_three_that_are_rounded_each_for_itself() -> None:
    keys = KEYS.noise(2, BLOCKS)
    parts = [
        np.rint(normals(keys, which, jnp.float64) * deviation).astype(np.int64)
        for which, deviation in enumerate((SCALE / math.sqrt(2), SCALE / math.sqrt(2), 2.0**20))
    ]
    difference = draw(keys, SCALE) - sum(parts)
    assert np.abs(difference).max() <= 2  # the scale is rounded up, and XLA multiplies in its own order
    assert (difference != 0).mean() < 1e-3


def test_without_64_bit_types_nothing_is_drawn() -> None:
    with pytest.raises(TypeError, match="float64"):
        integer_noise(KEYS.noise(0, 1), 10, SCALE)


# Keys


def test_same_keys_give_same_bits(first: np.ndarray) -> None:
    assert draw(KEYS.noise(0, BLOCKS), SCALE).tobytes() == first.tobytes()


@pytest.mark.parametrize(("which", "moved"), [(0, SCALE), (1, SCALE), (2, 2.0**20 * math.sqrt(2))])
@pytest.mark.parametrize("half", range(2))
def test_each_of_the_three_keys_matters(first: np.ndarray, which: int, half: int, moved: float) -> None:
    """Changing one key replaces its part, so the difference has twice the variance of that part."""
    keys = KEYS.noise(0, BLOCKS).copy()
    keys[:, which, half] ^= 1
    assert variance_is(draw(keys, SCALE) - first, moved)


def test_blocks_are_independent_and_have_keys_of_their_own(first: np.ndarray) -> None:
    blocks = first.reshape(BLOCKS, -1)
    correlation = np.corrcoef(blocks)[np.triu_indices(BLOCKS, 1)]
    assert np.abs(correlation).max() < 6 / np.sqrt(blocks.shape[1])
    keys = KEYS.noise(0, BLOCKS).copy()
    keys[1] ^= 1
    changed = (draw(keys, SCALE) != first).reshape(BLOCKS, -1)
    assert changed[1].mean() > 0.99
    assert not np.delete(changed, 1, axis=0).any()


def test_a_block_is_the_same_whatever_comes_after_it(first: np.ndarray) -> None:
    """So whoever owns some blocks alone can draw them alone."""
    size = block_size(COORDINATES)
    with jax.enable_x64(True):
        alone = jax.jit(lambda keys: jax.lax.map(partial(_block_of, size=size), keys))(KEYS.noise(0, BLOCKS)[3:5])
    assert np.asarray(alone).ravel().tobytes() == first[3 * size : 5 * size].tobytes()


def _block_of(keys: Any, size: int) -> Any:
    from dpdist.mechanism import noise

    return noise._block(keys, size=size, half=SCALE / math.sqrt(2) * (1 + 2.0**-50))


def test_steps_are_independent(first: np.ndarray) -> None:
    second = draw(KEYS.noise(1, BLOCKS), SCALE)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(first.size)
    assert variance_is(first + second, SCALE * np.sqrt(2))


def test_coordinates_are_independent(first: np.ndarray) -> None:
    values = first.astype(np.float64)
    for lag in (1, 2, 3, 4, 8, 2**13, 2**17, 2**18):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 4.5 / np.sqrt(len(values) - lag)


@pytest.mark.parametrize("coordinates", [1, 10, 4096, 4097, 300_000, 2**27])
def test_blocks_are_few_and_not_much_larger_than_what_they_hold(coordinates: int) -> None:
    size = block_size(coordinates)
    assert size & (size - 1) == 0
    blocks = -(-coordinates // size)
    assert blocks <= 128
    assert blocks * size < coordinates + max(4096, coordinates / 16)
