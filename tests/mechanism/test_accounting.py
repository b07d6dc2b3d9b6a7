"""Accounting: epsilon is an upper bound and close to the true value; the budget is never exceeded."""

from __future__ import annotations

from functools import cache
from typing import Any

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, stats

from dpdist.mechanism import accounting
from dpdist.mechanism.accounting import (
    EpsilonCurve,
    Spent,
    UnreachableBudgetError,
    affordable_steps,
    calibrate,
    epsilon,
)


@cache
def cost(q: float, sigma: float, steps: int, delta: float) -> Spent:
    return epsilon(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Compute the exact epsilon of one Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""

    def excess(eps: float) -> float:
        tail = np.exp(eps + stats.norm.logcdf(-0.5 / sigma - eps * sigma))
        return float(stats.norm.cdf(0.5 / sigma - eps * sigma) - tail - delta)

    return float(optimize.brentq(excess, 0, 200, xtol=1e-12))


def subsampled_epsilon(q: float, sigma: float, delta: float) -> float:
    """Compute the exact epsilon of one Poisson-subsampled Gaussian: the worse hockey-stick direction."""

    def mixture_tail(x: float) -> float:
        return float((1 - q) * stats.norm.sf(x / sigma) + q * stats.norm.sf((x - 1) / sigma))

    def crossing(ratio: float) -> float:
        """Return the point where the ratio of the densities, mixture over null, is `ratio`."""
        return sigma**2 * np.log((ratio - (1 - q)) / q) + 0.5

    def remove(eps: float) -> float:
        x = crossing(np.exp(eps))
        return float(mixture_tail(x) - np.exp(eps) * stats.norm.sf(x / sigma))

    def add(eps: float) -> float:
        if np.exp(-eps) <= 1 - q:
            return 0.0
        x = crossing(np.exp(-eps))
        return float(stats.norm.cdf(x / sigma) - np.exp(eps) * (1 - mixture_tail(x)))

    return float(optimize.brentq(lambda eps: max(remove(eps), add(eps)) - delta, 1e-9, 50, xtol=1e-12))


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [
        (1.0, 1, 1e-5),
        (5.0, 1, 1e-5),
        (0.7, 1, 1e-6),
        (3.0, 1, 1e-12),
        (100.0, 1, 1e-3),
        (10.0, 100, 1e-6),
        (40.0, 1000, 1e-5),
    ],
)
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(sigma / np.sqrt(steps), delta)
    assert abs(exact / dp_accounting.get_epsilon_gaussian(sigma / np.sqrt(steps), delta) - 1) < 1e-6
    spent = cost(1.0, sigma, steps, delta)
    assert exact <= spent.epsilon <= 1.01 * exact
    assert spent.epsilon_rdp >= exact
    assert (spent.accountant, spent.delta) == ("pld", delta)


@pytest.mark.parametrize(("q", "sigma", "delta"), [(0.1, 1.0, 1e-5), (0.5, 2.0, 1e-6), (0.01, 0.6, 1e-7)])
def test_one_sampled_step_costs_its_exact_epsilon(q: float, sigma: float, delta: float) -> None:
    exact = subsampled_epsilon(q, sigma, delta)
    spent = cost(q, sigma, 1, delta)
    assert exact <= spent.epsilon <= 1.01 * exact
    assert spent.epsilon_rdp >= exact


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 1.2, 25), (0.02, 0.8, 60)])
def test_many_sampled_steps_cost_what_a_simulation_says(q: float, sigma: float, steps: int) -> None:
    """delta(eps) = E max(0, 1 - exp(eps - loss)) over the composed privacy loss, from 200,000 draws of it."""
    delta, n, random = 1e-2, 200_000, np.random.default_rng(0)
    loss = np.zeros(n)
    for _ in range(steps):
        x = random.normal(size=n) * sigma + (random.random(n) < q)
        loss += np.log1p(q * np.expm1((x - 0.5) / sigma**2))

    def simulated(eps: float) -> tuple[float, float]:
        values = np.maximum(0.0, -np.expm1(np.minimum(eps - loss, 0)))
        return float(values.mean()), float(values.std() / np.sqrt(n))

    spent = cost(q, sigma, steps, delta).epsilon
    mean, error = simulated(spent)
    assert mean - 4 * error <= delta  # the stated epsilon holds
    mean, error = simulated(0.95 * spent)
    assert mean - 4 * error > delta  # and 5% less would not


@pytest.mark.parametrize("varied", ["sampling_probability", "noise_multiplier", "steps", "delta"])
def test_epsilon_is_monotone(varied: str) -> None:
    values = {
        "sampling_probability": [0.049, 0.05, 0.1],
        "noise_multiplier": [2.1, 2.0, 1.5],
        "steps": [1, 40, 41],
        "delta": [1.1e-5, 1e-5, 1e-8],
    }[varied]
    plan: dict[str, Any] = {"sampling_probability": 0.05, "noise_multiplier": 2.0, "steps": 40, "delta": 1e-5}
    spent = [cost(*(plan | {varied: value}).values()) for value in values]
    assert spent[0].epsilon < spent[1].epsilon < spent[2].epsilon
    assert spent[0].epsilon_rdp < spent[1].epsilon_rdp < spent[2].epsilon_rdp
    assert all(0 < s.epsilon <= s.epsilon_rdp for s in spent)


def test_no_step_costs_nothing() -> None:
    assert cost(0.1, 1.0, 0, 1e-5).epsilon == 0


def test_a_huge_epsilon_is_stated_by_renyi_dp_alone() -> None:
    spent = cost(0.5, 0.2, 1000, 1e-5)
    assert spent.accountant == "rdp"
    assert spent.epsilon == spent.epsilon_rdp > 100


def test_the_accountant_is_given_the_probability_that_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^-66 is below the grid: 2^-64 is sampled, so that must be charged, by the curve too."""
    given: list[float] = []
    event = dp_accounting.PoissonSampledDpEvent

    def recorded(sampling_probability: float, event_: Any) -> Any:
        given.append(sampling_probability)
        return event(0.5, event_)

    monkeypatch.setattr(dp_accounting, "PoissonSampledDpEvent", recorded)
    cost.__wrapped__(2.0**-66, 3.0, 1, 1e-5)
    assert given == [2.0**-64]
    monkeypatch.undo()
    monkeypatch.setattr(accounting, "inclusion_probability", lambda q: 1.0)
    exact = gaussian_epsilon(3.0, 1e-5)
    curve = EpsilonCurve(sampling_probability=0.1, noise_multiplier=3.0, steps=2, delta=1e-5, total=50.0, points=2)
    assert exact <= curve.at(1) < 1.01 * exact
    assert exact <= cost.__wrapped__(0.1, 3.0, 1, 1e-5).epsilon < 1.01 * exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise multiplier"),
        ({"noise_multiplier": float("nan")}, "noise multiplier"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"steps": -1}, "steps"),
        ({"sampling_probability": 0.0}, "sampling probability"),
        ({"sampling_probability": 1.5}, "sampling probability"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    plan: dict[str, Any] = {"sampling_probability": 0.1, "noise_multiplier": 1.0, "steps": 1, "delta": 1e-5}
    with pytest.raises(ValueError, match=message):
        epsilon(**plan | change)


# Calibration


@pytest.mark.parametrize(("target", "q", "steps", "delta"), [(0.3, 0.01, 1000, 1e-6)])
def test_calibration_meets_the_target_and_hardly_more(target: float, q: float, steps: int, delta: float) -> None:
    sigma = calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
    assert cost(q, sigma, steps, delta).epsilon <= target
    assert cost(q, sigma - 1e-3, steps, delta).epsilon > target


def test_calibration_finds_the_gaussian_mechanisms_noise() -> None:
    sigma = calibrate(target_epsilon=0.3, sampling_probability=1.0, steps=1, delta=1e-5)
    exact = optimize.brentq(lambda s: gaussian_epsilon(s, 1e-5) - 0.3, 1, 50)
    assert exact <= sigma < exact + 1e-3


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
        assert shown[step] >= cost(q, sigma, step, delta).epsilon * (1 - 1e-9)
    for step in (3, 6, 9):  # at the points themselves it is exact
        assert shown[step] < 1.001 * cost(q, sigma, step, delta).epsilon
    again = EpsilonCurve(
        sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta, total=total, points=4
    )
    assert [again.at(step) for step in (9, 3)] == [
        shown[9],
        shown[3],
    ]  # in any order: a resumed run starts at a later step


def test_the_curve_of_a_huge_epsilon_is_renyi_dps() -> None:
    q, sigma, delta, steps = 0.5, 0.2, 1e-5, 1000
    total = cost(q, sigma, steps, delta).epsilon
    curve = EpsilonCurve(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta, total=total)
    assert abs(curve.at(500) / cost(q, sigma, 500, delta).epsilon_rdp - 1) < 1e-9
    assert curve.at(1000) == total
