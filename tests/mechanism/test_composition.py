"""What incarnations cost together: never less than the truth, and true at every moment, however steps were chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpdist.mechanism.accounting import UnreachableBudgetError, epsilon
from dpdist.mechanism.composition import (
    Phase,
    adaptive_epsilon,
    affordable_further_steps,
    best_order,
    calibrate_further_steps,
    within,
)

PLAN, DELTA = Phase(0.02, 1.2, 500), 1e-5
ORDER = best_order(PLAN, DELTA)


def test_the_gaussian_mechanism_has_its_known_divergence() -> None:
    """alpha / (2 sigma^2) a step (Mironov 2017, Proposition 7)."""
    for order in (2, 8, 64):
        expected = 30 * order / (2 * 5.0**2) + math.log(1 / DELTA) / (order - 1)
        assert adaptive_epsilon([Phase(1.0, 5.0, 30)], order=order, delta=DELTA) == pytest.approx(expected)


def test_the_chosen_order_is_the_cheapest() -> None:
    cost = adaptive_epsilon([PLAN], order=ORDER, delta=DELTA)
    assert all(cost <= adaptive_epsilon([PLAN], order=order, delta=DELTA) for order in range(2, 65))


@pytest.mark.parametrize("cuts", [(500,), (100, 400), (1, 0, 499), (250, 250)])
def test_it_does_not_matter_how_steps_are_cut_into_phases_and_it_is_above_the_fixed_plans(cuts: tuple[int]) -> None:
    phases = [Phase(PLAN.sampling_probability, PLAN.noise_multiplier, steps) for steps in cuts]
    found = adaptive_epsilon(phases, order=ORDER, delta=DELTA)
    assert found == pytest.approx(adaptive_epsilon([PLAN], order=ORDER, delta=DELTA), rel=1e-12)
    assert found > epsilon(sampling_probability=0.02, noise_multiplier=1.2, steps=500, delta=DELTA).epsilon


def test_nothing_costs_nothing() -> None:
    assert adaptive_epsilon([], order=ORDER, delta=DELTA) == 0
    assert adaptive_epsilon([Phase(0.1, 1.0, 0)], order=ORDER, delta=DELTA) == 0


def test_no_strategy_passes_the_stated_epsilon_more_often_than_delta() -> None:
    """The privacy loss of a run whose next noise depends on its loss so far, watched at all times, simulated.

    Plain Gaussian steps: the loss of one with noise sigma is N(1 / (2 sigma^2), 1 / sigma^2). The adversary spends
    much where luck is bad, little where it is good, and counts every moment at which the statement was false.
    """
    draw, delta, order, trials = np.random.default_rng(5), 0.02, 8, 100_000
    loss, spent, failed = np.zeros(trials), np.zeros(trials), np.zeros(trials, bool)
    for _ in range(60):
        bad = loss > spent / order  # above what was to be expected
        sigma = np.where(bad, 2.0, 12.0)
        loss += draw.normal(1 / (2 * sigma**2), 1 / sigma)
        spent += order / (2 * sigma**2)
        failed |= loss > spent + math.log(1 / delta) / (order - 1)
    assert failed.mean() <= delta
    assert failed.mean() > delta / 20  # the bound is not empty: half its tail would not do
    again = adaptive_epsilon([Phase(1.0, 2.0, 3), Phase(1.0, 12.0, 4)], order=order, delta=delta)
    assert again == pytest.approx(order * (3 / 8 + 4 / 288) + math.log(1 / delta) / (order - 1))


def test_the_first_plan_covers_its_own_steps_and_no_others() -> None:
    q, sigma = PLAN.sampling_probability, PLAN.noise_multiplier
    assert within(PLAN, [Phase(q, sigma, 200), Phase(q, sigma, 300)])
    assert not within(PLAN, [Phase(q, sigma, 200), Phase(q, sigma, 301)])
    assert not within(PLAN, [Phase(q, sigma * 2, 10)])
    assert not within(PLAN, [Phase(q / 2, sigma, 10)])


def test_affordable_steps_fit_and_one_more_does_not() -> None:
    before, further = [Phase(0.02, 1.2, 200)], Phase(0.05, 1.5, 10_000)
    target = 1.5 * adaptive_epsilon(before, order=ORDER, delta=DELTA)

    def cost(steps: int) -> float:
        return adaptive_epsilon([*before, Phase(0.05, 1.5, steps)], order=ORDER, delta=DELTA)

    steps = affordable_further_steps(before, further, target_epsilon=target, order=ORDER, delta=DELTA)
    assert 0 < steps < 10_000
    assert cost(steps) <= target < cost(steps + 1)
    few = Phase(0.05, 1.5, 3)
    assert affordable_further_steps(before, few, target_epsilon=target, order=ORDER, delta=DELTA) == 3
    assert affordable_further_steps(before, further, target_epsilon=0.1, order=ORDER, delta=DELTA) == 0


def test_steps_that_cost_nothing_that_a_float_can_hold_all_fit() -> None:
    free = Phase(1e-12, 1e4, 1000)
    assert affordable_further_steps([PLAN], free, target_epsilon=100.0, order=ORDER, delta=DELTA) == 1000
    assert affordable_further_steps([PLAN], free, target_epsilon=0.1, order=ORDER, delta=DELTA) == 0


def test_calibration_spends_what_is_left_and_no_more() -> None:
    before = [PLAN]
    target = 1.4 * adaptive_epsilon(before, order=ORDER, delta=DELTA)
    sigma = calibrate_further_steps(
        before, sampling_probability=0.05, steps=300, target_epsilon=target, order=ORDER, delta=DELTA
    )
    spent = adaptive_epsilon([*before, Phase(0.05, sigma, 300)], order=ORDER, delta=DELTA)
    assert 0.999 * target < spent <= target
    fits = affordable_further_steps(before, Phase(0.05, sigma, 300), target_epsilon=target, order=ORDER, delta=DELTA)
    assert fits == 300


@pytest.mark.parametrize(("factor", "words"), [(0.9, "leaves too little"), (1e9, "no real privacy")])
def test_a_target_that_no_noise_meets_is_refused(factor: float, words: str) -> None:
    target = factor * adaptive_epsilon([PLAN], order=ORDER, delta=DELTA)
    with pytest.raises(UnreachableBudgetError, match=words):
        calibrate_further_steps(
            [PLAN], sampling_probability=0.05, steps=300, target_epsilon=target, order=ORDER, delta=DELTA
        )
