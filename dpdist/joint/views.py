"""One guarantee seen in other ways: delta over epsilon, Gaussian and zero-concentrated DP, and what an attack can do.

All of it is for a plan fixed before its first step: T steps of sampling probability q and noise multiplier sigma. The
curve is the smaller of two upper bounds at every epsilon, and goes through what `dpdist.mechanism.accounting` states:
delta(epsilon) holds at (1 - k) delta, the rest being kept for a plan that is left.

Three kinds of neighbours: a unit (a record, unless `data.unit` says otherwise) zeroed out; `records` of them zeroed out
at once, each sampled on its own, whose sums are dominated by a mixture of Gaussians with binomial weights (Ganesh 2024,
arXiv 2401.10294); and a single record of a unit, whose removal replaces that unit by another one: two zero-outs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, from_mixture_gaussian_mechanism
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from scipy.stats import binom, norm

from dpdist.errors import InputError
from dpdist.mechanism.accounting import INTERVALS, KEPT, ORDERS, divergences
from dpdist.mechanism.composition import Phase
from dpdist.mechanism.sampling import inclusion_probability
from dpdist.run.calibration import best_order

Array = np.ndarray

#: Delta that round-off is worth, a step: see `dpdist.mechanism.accounting`.
_ROUND_OFF = 16 * 2.0**-53
#: Points of a curve, those of a first look at how far it reaches, and the least delta that it goes down to.
_POINTS, _FEW, _LEAST_DELTA = 2001, 81, 1e-12
#: Beyond, e^epsilon is close to the largest float, and nobody's privacy.
_LARGEST_EPSILON = 700.0
#: The most units at once: the mixture has a component for each number of them.
_MOST_RECORDS = 64


@dataclass(frozen=True)
class Curve:
    """An upper bound on delta at each of many epsilons, ascending from 0; between two of them the left one's holds."""

    epsilons: Array
    deltas: Array

    def epsilon(self, delta: float) -> float:
        """The least epsilon of the curve whose delta is at most `delta`; infinite where there is none."""
        there = np.nonzero(self.deltas <= delta)[0]
        return float(self.epsilons[there[0]]) if len(there) else math.inf

    def at(self, epsilons: Array) -> Array:
        """The bound on delta at other epsilons, 0 or more."""
        return self.deltas[np.searchsorted(self.epsilons, epsilons, side="right") - 1]

    def apart(self, distance: int) -> Curve:
        """For neighbours that are so many zero-outs apart: (n eps, (1 + e^eps + ... + e^((n - 1) eps)) delta)."""
        with np.errstate(over="ignore"):
            factor = sum(np.exp(step * self.epsilons) for step in range(distance))
            deltas = np.minimum(1.0, self.deltas * factor)
        return Curve(distance * self.epsilons, np.minimum.accumulate(deltas))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The largest rate at which any test finds who is in, at this rate of false alarms.

        Every (epsilon, delta) bounds it twice (Kairouz et al. 2015, arXiv 1311.0776): by e^epsilon F + delta, and by
        1 - e^-epsilon (1 - delta - F).
        """
        with np.errstate(over="ignore"):
            first = np.exp(self.epsilons) * false_positive_rate + self.deltas
            second = 1 - np.exp(-self.epsilons) * (1 - self.deltas - false_positive_rate)
        return float(min(1.0, first.min(), second.min()))

    def advantage(self) -> float:
        """The largest difference of true and false positive rate of any test: the total variation, delta at 0."""
        return float(self.deltas[0])


def curve(plan: Phase, *, records: int = 1) -> Curve:
    """Delta over epsilon, from 0 to where delta is nothing.

    Args:
        records: units that are zeroed out at once.

    Raises:
        InputError: there are too many, or none.
    """
    if not 1 <= records <= _MOST_RECORDS:
        raise InputError("--records", records, f"give 1 to {_MOST_RECORDS}.")
    bound, widest = _delta_bound(plan, records)
    reach = float(_sampled(bound, widest, _FEW).epsilons[-1])
    found = _sampled(bound, reach, _POINTS)
    if records == 1:
        return found
    group = curve(plan).apart(records)
    return Curve(found.epsilons, np.minimum(found.deltas, group.at(found.epsilons)))


def _sampled(bound: Callable[[Array], Array], widest: float, points: int) -> Curve:
    epsilons = np.linspace(0.0, widest, points)
    deltas = np.minimum.accumulate(np.minimum(1.0, bound(epsilons) / (1 - KEPT)))
    end = int(np.searchsorted(-deltas, -_LEAST_DELTA)) + 1  # nothing is asked of what lies beyond
    return Curve(epsilons[:end], deltas[:end])


def _delta_bound(plan: Phase, records: int) -> tuple[Callable[[Array], Array], float]:
    """A function from epsilons to bounds on delta, and an epsilon with hardly any."""
    q, sigma, steps = inclusion_probability(plan.sampling_probability), plan.noise_multiplier, plan.steps
    # All units at once as one of their number's size, sampled whenever one is: an upper bound of all that follows.
    losses = divergences(min(1.0, records * q), sigma / records, steps, ORDERS)
    widest = max(1e-3, float(compute_epsilon(ORDERS, losses, _LEAST_DELTA)[0]))
    reach = 10 * records / sigma + 0.5 * (records / sigma) ** 2
    intervals = INTERVALS if records == 1 else INTERVALS // 8  # a mixture takes ten times as long
    interval = max(1e-4, widest / intervals, reach / (2 * intervals))
    off = steps * _ROUND_OFF
    if records == 1:
        one = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
    else:
        weights = binom.pmf(range(records + 1), records, q)
        one = from_mixture_gaussian_mechanism(
            sigma, range(records + 1), weights / weights.sum(), value_discretization_interval=interval
        )
    all_steps = one.self_compose(steps)

    def bound(epsilons: Array) -> Array:
        by_distributions = np.asarray(all_steps.get_delta_for_epsilon(epsilons)) + off
        if records > 1:
            return by_distributions
        # A few will do: the bound of a point to the left holds to its right.
        by_renyi = [float(compute_delta(ORDERS, losses, epsilon)[0]) for epsilon in epsilons[:: len(epsilons) // 40]]
        return np.minimum(by_distributions, np.repeat(by_renyi, len(epsilons) // 40)[: len(epsilons)])

    return bound, min(widest, _LARGEST_EPSILON)


def gaussian_delta(mu: float, epsilons: Array) -> Array:
    """Delta of mu-GDP (Dong, Roth and Su 2022, Corollary 2.13)."""
    with np.errstate(over="ignore"):
        return norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + norm.logcdf(-mu / 2 - epsilons / mu))


def gdp(plan: Phase, found: Curve, delta: float, *, records: int = 1) -> dict[str, Any]:
    """Gaussian differential privacy: what holds, and, apart, the usual approximation.

    * `mu`: the plan is mu-GDP. Exact at q = 1; sampling only lowers what a step reveals, but its tails, which mu-GDP
      has to cover too, are those of a sampled step, so that no much smaller mu holds for all tests.
    * `mu_up_to_delta`: no test does better than against mu-GDP by more than `delta`, at whatever false positive rate.
    * `mu_clt`: what the central limit theorem gives (Bu et al. 2020, arXiv 1911.11607). NOT a bound.
    """
    q, sigma, steps = plan.sampling_probability, plan.noise_multiplier, plan.steps
    mu = records * math.sqrt(steps) / sigma * (1 + 1e-12)
    end = int(np.searchsorted(-found.deltas, -delta)) + 1
    epsilons, deltas = found.epsilons[:end], found.deltas[:end]

    def covers(mu: float) -> bool:
        # Between two points the curve is at most at its left value, and mu-GDP at least at its right one.
        return bool((np.append(deltas[:-1], 0.0) <= np.append(gaussian_delta(mu, epsilons[1:]) + delta, 0.0)).all())

    low, high = 0.0, mu
    if not covers(high):
        low = high = mu
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if covers(middle) else (middle, high)
    small = 1 / sigma**2 < 700
    return {
        "mu": mu,
        "mu_up_to_delta": high,
        "delta": delta,
        "approximation_only": {"mu_clt": q * math.sqrt(steps * math.expm1(1 / sigma**2)) if small else None},
    }


def zcdp(plan: Phase, delta: float, *, records: int = 1) -> dict[str, Any]:
    """Zero-concentrated DP and its relatives; all are upper bounds.

    * `rho`: the Renyi divergence of every order alpha is at most rho alpha (Bun and Steinke 2016); exact at q = 1.
    * `tcdp`: the same up to order `omega` only (Bun et al. 2018), where sampling helps.
    * `renyi`: divergences at whole orders.
    """
    rho = records**2 * plan.steps / (2 * plan.noise_multiplier**2) * (1 + 1e-12)
    found: dict[str, Any] = {"rho": rho, "tcdp": None, "renyi": None}
    if records > 1:
        return found
    values = divergences(plan.sampling_probability, plan.noise_multiplier, plan.steps, ORDERS)
    omega = best_order(plan, delta)
    # Divergences grow with the order, so the right end of an interval bounds all of it.
    ratios = [value / left for left, order, value in zip([1, *ORDERS], ORDERS, values, strict=False) if order <= omega]
    return found | {
        "tcdp": {"rho": min(rho, float(max(ratios))), "omega": omega},
        "renyi": [[order, float(value)] for order, value in zip(ORDERS, values, strict=True)],
    }


def attack(found: Curve, rates: Sequence[float]) -> dict[str, Any]:
    """What any test for membership can reach: true positive rates at false positive rates, and the advantage."""
    for rate in rates:
        if not 0 <= rate <= 1:
            raise InputError("--false-positive-rate", rate, "give a number from 0 to 1.")
    return {
        "advantage": found.advantage(),
        "rates": [{"false_positive": rate, "true_positive": found.true_positive_rate(rate)} for rate in rates],
    }
