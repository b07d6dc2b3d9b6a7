"""The noise draw: Gaussian by several tests, on a fine grid, and a function of its keys alone."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.noise import gaussian_draw

KEYS = Keys(Secret.from_insecure_seed(11), b"noise tests")
SIZES = (2**19, 2**18, 7)
SCALE = 1.7
ALPHA = 1e-5
draw_jit = jax.jit(partial(gaussian_draw, sizes=SIZES, scale=SCALE))


def draw(keys: np.ndarray) -> np.ndarray:
    return np.asarray(draw_jit(keys))


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return draw(KEYS.noise(0, len(SIZES)))


def variance_is(values: np.ndarray, scale: float) -> bool:
    """Return whether the sum of squares lies in the chi-square interval of N(0, scale^2)."""
    statistic = np.sum((values.astype(np.float64) / scale) ** 2)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], values.size)
    return bool(low < statistic < high)


def test_the_standard_deviation_is_the_scale(first: np.ndarray) -> None:
    assert first.dtype == np.float32
    assert first.shape == (sum(SIZES),)
    assert variance_is(first, SCALE)
    assert not variance_is(first, SCALE * 1.01)  # the interval is tight enough to reject 1%
    assert abs(first.mean(dtype=np.float64)) < 4.5 * SCALE / np.sqrt(first.size)


def test_the_distribution_is_normal(first: np.ndarray) -> None:
    assert stats.kstest(first.astype(np.float64) / SCALE, "norm").pvalue > ALPHA
    # The tails too: counts beyond 3 and 4 standard deviations on each side.
    for edge in (-4.0, -3.0, 3.0, 4.0):
        beyond = int(np.sum(first / SCALE < edge) if edge < 0 else np.sum(first / SCALE > edge))
        assert stats.binomtest(beyond, first.size, stats.norm.sf(abs(edge))).pvalue > ALPHA


def test_the_grid_is_finer_than_that_of_one_float32_normal() -> None:
    """Near 0, where float32 is finest, the draw has far more values than the 2^23 of a single normal."""
    single = np.asarray(jax.random.normal(jax.random.key(0), (2**20,), np.float32))
    averaged = np.asarray(jax.jit(partial(gaussian_draw, sizes=(2**20,), scale=1.0))(KEYS.noise(1, 1)))

    def collisions(values: np.ndarray) -> int:
        return len(values) - len(np.unique(values))

    # n values from a grid of m equally likely ones collide n^2 / 2m times: 65,536 times for m = 2^23.
    assert collisions(single) > 50_000  # a single draw is no finer
    assert collisions(averaged) < 2**40 / (2 * 2**24)  # a grid of more than 2^24 equally likely values
    # Neighbouring values in the middle of the distribution are closer too.
    middle = [np.unique(values[np.abs(values) < 0.05]) for values in (single, averaged)]
    assert np.diff(middle[1].astype(np.float64)).min() < np.diff(middle[0].astype(np.float64)).min()


def test_the_draw_is_the_halved_sum_of_four_independent_normals() -> None:
    keys = KEYS.noise(2, 1)
    drawn = np.asarray(gaussian_draw(keys, (1000,), 3.0), np.float64)
    parts = [
        np.asarray(jax.random.normal(jax.random.wrap_key_data(k, impl="threefry2x32"), (1000,), np.float32), np.float64)
        for k in keys[0]
    ]
    assert np.allclose(drawn, 3.0 * sum(parts) / 2, rtol=0, atol=1e-5)


def test_same_keys_give_same_bits(first: np.ndarray) -> None:
    assert draw(KEYS.noise(0, len(SIZES))).tobytes() == first.tobytes()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("half", range(2))
def test_each_of_the_four_keys_matters(first: np.ndarray, which: int, half: int) -> None:
    """Changing one key replaces a quarter of the variance, so the difference has variance 2 / 4."""
    keys = KEYS.noise(0, len(SIZES)).copy()
    keys[:, which, half] ^= 1
    assert variance_is(draw(keys) - first, SCALE * np.sqrt(0.5))


def test_leaves_are_independent_and_have_keys_of_their_own(first: np.ndarray) -> None:
    a, b = first[: SIZES[1]], first[SIZES[0] : SIZES[0] + SIZES[1]]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a))
    keys = KEYS.noise(0, len(SIZES)).copy()
    keys[1] ^= 1
    changed = draw(keys) != first
    assert changed[SIZES[0] : SIZES[0] + SIZES[1]].mean() > 0.99
    assert not changed[: SIZES[0]].any()
    assert not changed[SIZES[0] + SIZES[1] :].any()


def test_steps_are_independent(first: np.ndarray) -> None:
    second = draw(KEYS.noise(1, len(SIZES)))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(first.size)
    assert variance_is(first + second, SCALE * np.sqrt(2))


def test_coordinates_are_independent(first: np.ndarray) -> None:
    leaf = first[: SIZES[0]].astype(np.float64)
    for lag in (1, 2, 3, 4, 8, 2**17, 2**18):
        assert abs(np.corrcoef(leaf[lag:], leaf[:-lag])[0, 1]) < 4.5 / np.sqrt(len(leaf) - lag)
