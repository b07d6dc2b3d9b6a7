"""Accounting: epsilon is an upper bound and close to the true value; the budget is never exceeded."""

from __future__ import annotations

from typing import Any

import dp_accounting
import numpy as np
import pytest
from exact_epsilon import cost, gaussian_epsilon
from scipy import optimize, stats
from tilted_epsilon import tilted_epsilon

from dpdist.mechanism import accounting
from dpdist.mechanism.accounting import INTERVALS, KEPT, epsilon


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


@pytest.mark.parametrize("steps", [1, 100, 10_000, 100_000])
@pytest.mark.parametrize("mu", [0.3, 1.0, 5.0])
def test_no_small_delta_is_stated_below_the_exact_value(steps: int, mu: float) -> None:
    """Round-off of Fourier transforms is about T 2^-53: at 1e-14 and T = 1e4 it once took 2.8% off epsilon."""
    for delta in (1e-5, 1e-7, 1e-9, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14, 1e-15):
        exact = gaussian_epsilon(1 / mu, delta)
        spent = cost(1.0, np.sqrt(steps) / mu, steps, delta)
        assert exact <= spent.epsilon <= 1.15 * exact
        assert spent.accountant == ("pld" if steps * 2.0**-49 <= delta * (1 - KEPT) / 10 else "rdp")


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [(0.01, 1.0, 1000), (1e-3, 0.5, 10_000), (1e-5, 0.3, 100_000), (0.05, 50.0, 3000), (0.3, 0.2, 100), (1.0, 9.0, 50)],
)
def test_it_is_never_below_what_another_accountant_says(q: float, sigma: float, steps: int, delta: float) -> None:
    """With sampling there is no closed form; at q = 1 there is, and the other accountant is held to it."""
    known = tilted_epsilon(q, sigma, steps, delta)
    if q == 1.0:
        assert known == pytest.approx(gaussian_epsilon(sigma / np.sqrt(steps), delta), rel=1e-4)
    assert cost(q, sigma, steps, delta).epsilon >= known * (1 - 3e-4)


EXTREMES = [
    (q, sigma, steps, delta)
    for q in (1e-9, 0.01, 1.0)
    for sigma in (1e-3, 0.05, 0.3, 1e6)
    for steps in (1, 1000, 10**12)
    for delta in (1e-5, 1e-15)
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), EXTREMES)
def test_the_work_is_bounded_whatever_is_asked(
    q: float, sigma: float, steps: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid of losses that the library is asked for has at most so many points for a step and for all of them."""
    asked: list[float] = []
    original = accounting.from_gaussian_mechanism

    def recorded(sigma: float, *, sampling_prob: float, value_discretization_interval: float) -> Any:
        asked.append(value_discretization_interval)
        return original(sigma, sampling_prob=sampling_prob, value_discretization_interval=value_discretization_interval)

    monkeypatch.setattr(accounting, "from_gaussian_mechanism", recorded)
    spent = cost.__wrapped__(q, sigma, steps, delta)
    assert 0 <= spent.epsilon < np.inf
    widest = cost.__wrapped__(q, sigma, steps, 1e-15).epsilon_rdp
    for interval in asked[:1]:
        assert widest / interval <= 1.01 * INTERVALS
        assert (10 / sigma + 0.5 / sigma**2) / interval <= 2.01 * INTERVALS


def test_a_huge_epsilon_is_stated_by_both_accountants() -> None:
    spent = cost(0.5, 0.2, 1000, 1e-5)
    assert spent.accountant == "pld"
    assert 100 < spent.epsilon < spent.epsilon_rdp


def test_a_share_of_delta_is_kept_for_what_may_be_done_beyond_the_plan() -> None:
    """See `mechanism/composition.py`: the plan alone is at (1 - k) delta."""
    assert cost(1.0, 1.0, 1, 1e-5).epsilon >= gaussian_epsilon(1.0, (1 - KEPT) * 1e-5)


def test_the_accountants_are_given_the_probability_that_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^-66 is below the grid: 2^-64 is sampled, so that must be charged."""
    given: list[float] = []
    event, pld = accounting.PoissonSampledDpEvent, accounting.from_gaussian_mechanism

    def recorded(sampling_probability: float, event_: Any) -> Any:
        given.append(sampling_probability)
        return event(0.5, event_)

    def recorded_pld(sigma: float, *, sampling_prob: float, **how: Any) -> Any:
        given.append(sampling_prob)
        return pld(sigma, sampling_prob=0.5, **how)

    monkeypatch.setattr(accounting, "PoissonSampledDpEvent", recorded)
    monkeypatch.setattr(accounting, "from_gaussian_mechanism", recorded_pld)
    cost.__wrapped__(2.0**-66, 3.0, 1, 1e-5)
    assert set(given) == {2.0**-64}
    assert len(given) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise multiplier"),
        ({"noise_multiplier": float("nan")}, "noise multiplier"),
        ({"noise_multiplier": 1e-200}, "noise multiplier"),
        ({"noise_multiplier": float("inf")}, "noise multiplier"),
        ({"steps": 10**13}, "steps"),
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
