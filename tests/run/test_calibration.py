"""Searches for a plan meet their target, and no more; the curve of a progress line is above the truth."""

from __future__ import annotations

from typing import Any

import pytest
from exact_epsilon import cost, gaussian_epsilon
from scipy import optimize

from dpdist.config import from_dict
from dpdist.errors import InputError
from dpdist.mechanism.accounting import INTERVALS, epsilon
from dpdist.mechanism.composition import Phase, adaptive_epsilon
from dpdist.mechanism.ledger import Plan
from dpdist.run import calibration
from dpdist.run.calibration import (
    EpsilonCurve,
    UnreachableBudgetError,
    affordable_further_steps,
    affordable_steps,
    best_order,
    calibrate,
    calibrate_further_steps,
)
from dpdist.run.plan import plan_run

PLAN, DELTA = Phase(0.02, 1.2, 500), 1e-5
ORDER = best_order(PLAN, DELTA)

# Calibration


@pytest.mark.parametrize("target", [0.01, 0.1, 1.0, 8.0, 51.0, 75.0, 300.0, 1000.0])
@pytest.mark.parametrize(("q", "steps", "delta"), [(0.01, 1000, 1e-5), (1.0, 1, 1e-6), (0.5, 10_000, 1e-6)])
def test_every_target_is_met_within_a_tenth_of_a_percent(target: float, q: float, steps: int, delta: float) -> None:
    """A target of 75 once came out as 29.4, and one of 51 as 26.0, after minutes."""
    sigma = calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
    assert 0.999 * target < cost(q, sigma, steps, delta).epsilon <= target


@pytest.mark.parametrize(("q", "steps", "delta"), [(0.01, 1000, 1e-5), (1e-4, 10, 0.999e-3)])
def test_few_epsilons_are_computed_on_the_fine_grid(
    q: float, steps: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a second or two where sigma is small; 25 of them were more than is bearable."""
    fine: list[float] = []

    def counted(*, noise_multiplier: float, intervals: int = INTERVALS, **plan: Any) -> Any:
        fine.extend([noise_multiplier] * (intervals == INTERVALS))
        return epsilon(noise_multiplier=noise_multiplier, intervals=intervals, **plan)

    monkeypatch.setattr(calibration, "epsilon", counted)
    for target in (0.01, 1.0, 50.0):
        fine.clear()
        calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
        assert len(fine) <= 10


def test_a_delta_next_to_the_number_of_samples_is_no_trap() -> None:
    """With delta near q T next to no noise is needed, and the search once did not come to an end."""
    sigma = calibrate(target_epsilon=1.0, sampling_probability=1e-4, steps=10, delta=9e-4)
    assert cost(1e-4, sigma, 10, 9e-4).epsilon <= 1.0


@pytest.mark.parametrize(("target", "q", "steps", "delta"), [(0.3, 0.01, 1000, 1e-6)])
def test_calibration_meets_the_target_and_hardly_more(target: float, q: float, steps: int, delta: float) -> None:
    sigma = calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
    assert cost(q, sigma, steps, delta).epsilon <= target
    assert cost(q, sigma, steps, delta).epsilon > 0.999 * target


def test_calibration_finds_the_gaussian_mechanisms_noise() -> None:
    sigma = calibrate(target_epsilon=0.3, sampling_probability=1.0, steps=1, delta=1e-5)
    exact = optimize.brentq(lambda s: gaussian_epsilon(s, 1e-5) - 0.3, 1, 50)
    assert exact <= sigma < 1.002 * exact


@pytest.mark.parametrize(("target", "steps", "message"), [(1e-9, 1, "costs more"), (1e9, 1, "no real privacy")])
def test_a_target_no_noise_can_meet_is_refused(target: float, steps: int, message: str) -> None:
    with pytest.raises(UnreachableBudgetError, match=message):
        calibrate(target_epsilon=target, sampling_probability=1.0, steps=steps, delta=1e-12)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan")])
def test_a_target_that_is_no_budget_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target epsilon"):
        calibrate(target_epsilon=target, sampling_probability=0.1, steps=10, delta=1e-5)


# Affordable steps


def test_one_more_step_than_affordable_exceeds_the_budget() -> None:
    q, sigma, delta, target = 0.2, 8.0, 1e-5, 0.25
    fit = affordable_steps(target_epsilon=target, sampling_probability=q, noise_multiplier=sigma, steps=30, delta=delta)
    assert 1 < fit < 30
    assert cost(q, sigma, fit, delta).epsilon <= target < cost(q, sigma, fit + 1, delta).epsilon


def test_a_budget_never_allows_more_steps_than_asked() -> None:
    allowed = affordable_steps(target_epsilon=50.0, sampling_probability=0.1, noise_multiplier=5.0, steps=7, delta=1e-5)
    assert allowed == 7


def test_a_budget_may_allow_no_step() -> None:
    assert (
        affordable_steps(target_epsilon=0.01, sampling_probability=1.0, noise_multiplier=9.0, steps=4, delta=1e-5) == 0
    )


# The curve


def test_the_curve_is_never_below_the_truth() -> None:
    q, sigma, delta, steps = 0.1, 6.0, 1e-5, 11
    total = cost(q, sigma, steps, delta).epsilon
    curve = EpsilonCurve(
        sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta, total=total, points=4
    )
    shown = [curve.at(step) for step in range(steps + 1)]
    assert shown[0] == 0
    assert shown[-1] == total
    assert shown == sorted(shown)
    assert len(set(shown)) == 1 + 4
    for step in range(1, steps + 1):
        assert shown[step] >= cost(q, sigma, step, delta).epsilon * (1 - 1e-5)
    for step in (3, 6, 9):  # at the points themselves it is close
        assert shown[step] < 1.01 * cost(q, sigma, step, delta).epsilon
    again = EpsilonCurve(
        sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta, total=total, points=4
    )
    assert [again.at(step) for step in (9, 3)] == [
        shown[9],
        shown[3],
    ]  # in any order: a resumed run starts at a later step


# Further steps


def test_the_chosen_order_is_the_cheapest() -> None:
    cost = adaptive_epsilon([PLAN], order=ORDER, delta=DELTA)
    assert all(cost <= adaptive_epsilon([PLAN], order=order, delta=DELTA) for order in range(2, 65))


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


def test_a_run_that_no_grid_can_hold_is_refused_with_a_remedy_that_helps() -> None:
    def planned(coordinates: int) -> Plan:
        settings = {"privacy": {"noise_multiplier": 2.0, "delta": 1e-12}, "training": {"steps": 1}}
        config = from_dict(settings | {"sampling": {"expected_batch_size": 10_000}})
        return plan_run(config, dataset_size=2 * 10**9, coordinates=coordinates, nonce=b"", environment="")

    with pytest.raises(InputError, match="train fewer parameters"):  # more noise would need a coarser grid still
        planned(10**13)
    assert planned(10**8).private_terms().grid
