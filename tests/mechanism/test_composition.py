"""What incarnations cost together: never less than the truth, and true at every moment, however steps were chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpdist.mechanism.accounting import KEPT, epsilon
from dpdist.mechanism.composition import Phase, adaptive_epsilon, within

PLAN, DELTA = Phase(0.02, 1.2, 500), 1e-5
ORDER = 14


def tail(order: int, delta: float) -> float:
    """What a Renyi bound of this order adds for a share of `KEPT` of delta (Canonne et al. 2020, Proposition 12)."""
    return math.log1p(-1 / order) - math.log(order * KEPT * delta) / (order - 1)


def test_the_gaussian_mechanism_has_its_known_divergence() -> None:
    """alpha / (2 sigma^2) a step (Mironov 2017, Proposition 7)."""
    for order in (2, 8, 64):
        expected = 30 * order / (2 * 5.0**2) + tail(order, DELTA)
        assert adaptive_epsilon([Phase(1.0, 5.0, 30)], order=order, delta=DELTA) == pytest.approx(expected)


@pytest.mark.parametrize("cuts", [(500,), (100, 400), (1, 0, 499), (250, 250)])
def test_it_does_not_matter_how_steps_are_cut_into_phases_and_it_is_above_the_fixed_plans(cuts: tuple[int]) -> None:
    phases = [Phase(PLAN.sampling_probability, PLAN.noise_multiplier, steps) for steps in cuts]
    found = adaptive_epsilon(phases, order=ORDER, delta=DELTA)
    assert found == pytest.approx(adaptive_epsilon([PLAN], order=ORDER, delta=DELTA), rel=1e-12)
    assert found > epsilon(sampling_probability=0.02, noise_multiplier=1.2, steps=500, delta=DELTA).epsilon


def test_nothing_costs_nothing() -> None:
    assert adaptive_epsilon([], order=ORDER, delta=DELTA) == 0
    assert adaptive_epsilon([Phase(0.1, 1.0, 0)], order=ORDER, delta=DELTA) == 0


def test_no_strategy_of_spending_and_stopping_beats_the_stated_epsilon() -> None:
    """The privacy loss of a run whose next noise depends on its loss so far, and that ends when it likes, simulated.

    Plain Gaussian steps: the loss of one with noise sigma is N(1 / (2 sigma^2), 1 / sigma^2). The adversary spends
    much where luck is bad, little where it is good, and stops where the statement is false, as soon as it is.
    """
    draw, delta, order, trials = np.random.default_rng(5), 0.9, 8, 100_000
    loss, spent, failed = np.zeros(trials), np.zeros(trials), np.zeros(trials)
    running = np.ones(trials, bool)
    for _ in range(60):
        bad = loss > spent / order  # above what was to be expected
        sigma = np.where(bad, 2.0, 12.0)
        loss += draw.normal(1 / (2 * sigma**2), 1 / sigma)
        spent += order / (2 * sigma**2)
        beyond = loss - spent - tail(order, delta)
        ends = running & (beyond > 0)
        failed[ends] = -np.expm1(-beyond[ends])
        running &= ~ends
    assert 0 < failed.mean() <= KEPT * delta
    assert failed.mean() > KEPT * delta / 50  # the bound is not empty
    again = adaptive_epsilon([Phase(1.0, 2.0, 3), Phase(1.0, 12.0, 4)], order=order, delta=delta)
    assert again == pytest.approx(order * (3 / 8 + 4 / 288) + tail(order, delta))


def test_the_first_plan_covers_its_own_steps_and_no_others() -> None:
    q, sigma = PLAN.sampling_probability, PLAN.noise_multiplier
    assert within(PLAN, [Phase(q, sigma, 200), Phase(q, sigma, 300)])
    assert not within(PLAN, [Phase(q, sigma, 200), Phase(q, sigma, 301)])
    assert not within(PLAN, [Phase(q, sigma * 2, 10)])
    assert not within(PLAN, [Phase(q / 2, sigma, 10)])
