"""The bound from two sets of runs, against distributions whose epsilon is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from dpdist.audit.bounds import Bound, clopper_pearson, epsilon_lower, epsilon_of_counts


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Epsilon of N(0, 1) against N(shift, 1) (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        inside, outside = shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift
        return float(stats.norm.cdf(inside) - math.exp(epsilon) * stats.norm.cdf(outside)) - delta

    return float(optimize.brentq(excess, 0, 100))


def gaussian(shift: float, runs: int, seed: int, *, delta: float, confidence: float = 0.95) -> Bound:
    draw = np.random.default_rng(seed)
    return epsilon_lower(draw.normal(shift, 1, runs), draw.normal(0, 1, runs), delta=delta, confidence=confidence)


def test_the_limits_are_those_of_the_closed_form_at_the_ends() -> None:
    assert clopper_pearson(0, 20, 0.95) == pytest.approx((0, 1 - 0.05 ** (1 / 20)))
    assert clopper_pearson(20, 20, 0.95) == pytest.approx((0.05 ** (1 / 20), 1))


@pytest.mark.parametrize("probability", [0.003, 0.1, 0.37, 0.5, 0.92])
def test_each_limit_is_wrong_with_at_most_the_stated_probability(probability: float) -> None:
    """By summing over all outcomes, with no sampling."""
    counts = np.arange(41)
    chances = stats.binom(40, probability).pmf(counts)
    limits = np.array([clopper_pearson(int(count), 40, 0.9) for count in counts])
    assert chances[limits[:, 0] > probability].sum() <= 0.1
    assert chances[limits[:, 1] < probability].sum() <= 0.1


def test_a_certain_difference_gives_as_much_as_the_number_of_runs_can() -> None:
    found = epsilon_lower(np.ones(300), np.zeros(300), delta=0.0, confidence=0.95)
    low, high = 0.025 ** (1 / 200), 1 - 0.025 ** (1 / 200)
    assert found.epsilon_lower == pytest.approx(math.log(low / high))
    assert found.happened in ((200, 0), (0, 200))
    assert found.runs == (200, 200)


def test_the_direction_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(2, 1, 900), draw.normal(0, 1, 900)
    assert epsilon_lower(a, b, delta=0.05, confidence=0.95).epsilon_lower > 2
    assert epsilon_lower(b, a, delta=0.05, confidence=0.95).epsilon_lower > 2
    assert epsilon_lower(-a, b, delta=0.05, confidence=0.95).epsilon_lower > 2


@pytest.mark.parametrize(("shift", "delta"), [(1.0, 0.05), (2.0, 0.1), (2.0, 1e-5)])
def test_the_bound_on_a_gaussian_stays_below_its_epsilon_as_often_as_stated(shift: float, delta: float) -> None:
    truth = gaussian_epsilon(shift, delta)
    wrong = sum(gaussian(shift, 90, seed, delta=delta, confidence=0.8).epsilon_lower > truth for seed in range(100))
    assert wrong <= stats.binom(100, 0.2).ppf(0.999)


def test_no_difference_is_rarely_taken_for_one() -> None:
    """Though the event is chosen: on runs that are set aside."""
    wrong = sum(gaussian(0.0, 90, seed, delta=0.0, confidence=0.8).epsilon_lower > 0 for seed in range(100))
    assert wrong <= stats.binom(100, 0.2).ppf(0.999)


def test_many_runs_come_near_the_epsilon_of_a_gaussian() -> None:
    found = gaussian(2.0, 60_000, 1, delta=0.1)
    assert 0.88 * gaussian_epsilon(2.0, 0.1) < found.epsilon_lower < gaussian_epsilon(2.0, 0.1)


def test_delta_is_taken_off_the_likelier_event() -> None:
    counts = (90, 100), (5, 100)
    low, high = clopper_pearson(90, 100, 0.975)[0], clopper_pearson(5, 100, 0.975)[1]
    assert epsilon_of_counts(*counts, delta=0.2, confidence=0.95) == pytest.approx(math.log((low - 0.2) / high))
    assert epsilon_of_counts(*counts, delta=0.9, confidence=0.95) == 0


def test_too_few_runs_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and 9 runs are too few"):
        epsilon_lower(np.zeros(5), np.zeros(9), delta=0.1, confidence=0.95)
    with pytest.raises(ValueError, match="NaN"):
        epsilon_lower(np.full(9, np.nan), np.zeros(9), delta=0.1, confidence=0.95)
