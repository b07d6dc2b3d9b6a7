"""What a search costs: a random number of trials, of which only the best is released.

A trial is any mechanism Q whose results are ordered, such as: draw hyper-parameters from a public space, train under
DP-SGD, measure on public test data. The search draws a number K that does not depend on the data, runs Q that many
times independently, and releases the best result alone. Papernot and Steinke (2022, arXiv 2110.03620), after Liu and
Talwar (2019), bound its Renyi divergence at order a by that of Q at all orders. For K of mean m

* from the truncated negative binomial distribution of shape eta >= 0 and parameter g (Theorem 2): for every order b,

    R(a) + (1 + eta) ((1 - 1/b) R(b) + log(1/g) / b) + log(m) / (a - 1);

* from the Poisson distribution (Theorem 6): with d the delta of Q at epsilon log(1 + 1 / (a - 1)),

    R(a) + m d + log(m) / (a - 1).

Both are statements about one pair of datasets, in both directions, whatever makes them neighbours: `divergences` gives
the larger of both directions under the adjacency of the accountants here. Where trials differ, R is a bound of all
they may be: the divergence of a choice among mechanisms, made without the data, is at most the largest of theirs.

K must stay unknown: whoever knows that K = k faces the best of k runs, for which nothing better holds than that all k
results were released (`best_of_fixed`).

The figures are those of dp-accounting's `RepeatAndSelectDpEvent`, of slightly larger divergences (they are rounded up
for round-off); a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from scipy import optimize

from dpdist.joint.together import fixed_cost
from dpdist.mechanism.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    MOST_STEPS,
    ORDERS,
    SMALLEST_NOISE_MULTIPLIER,
    Spent,
    divergences,
)
from dpdist.mechanism.composition import Phase
from dpdist.run.calibration import least_noise

#: The accountant's name where what is stated is the cost of a search.
SELECTION = "renyi selection"
#: Shapes by name; another one is given as a number.
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}
#: The largest expected number of trials, and the least above 1.
MOST_EXPECTED, LEAST_EXPECTED = 500.0, 1 + 1e-6
#: The largest shape that is finite: beyond, float64 does not tell g from 1.
MOST_SHAPE = 1e6
#: By how much what is charged is above what is drawn from, so that no root or sum is off to the wrong side.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Law:
    """How the number of trials is drawn.

    Args:
        mean: m, the expected number.
        shape: eta of the truncated negative binomial distribution: 0 is the logarithmic one, 1 the geometric one. The
            larger, the more closely the number keeps to its mean, and the more it costs. Infinity is the Poisson
            distribution, which may also draw 0.

    Raises:
        ValueError: an argument out of range.
    """

    mean: float
    shape: float

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= MOST_EXPECTED:
            raise ValueError(f"the expected number of trials must be 1 to {MOST_EXPECTED:g}, not {self.mean!r}")
        if 1 < self.mean < LEAST_EXPECTED:
            raise ValueError(f"the expected number of trials must be 1, or {LEAST_EXPECTED} or more, not {self.mean!r}")
        if not (0 <= self.shape <= MOST_SHAPE or self.shape == math.inf):
            raise ValueError(f"the shape must be 0 to {MOST_SHAPE:g}, or poisson, its limit, not {self.shape!r}")

    @property
    def name(self) -> str:
        """The distribution's name."""
        known = {shape: name for name, shape in SHAPES.items()}
        return known.get(self.shape, f"truncated negative binomial of shape {self.shape:g}")

    def to_record(self) -> dict[str, Any]:
        """The law as JSON, which has no infinity: the shape of the Poisson distribution is null."""
        shape = None if self.shape == math.inf else self.shape
        return {"distribution": self.name, "expected_trials": self.mean, "shape": shape}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Law:
        """The inverse of `to_record`."""
        return cls(record["expected_trials"], math.inf if record["shape"] is None else record["shape"])

    @cached_property
    def parameter(self) -> float:
        """g in (0, 1], of which the truncated negative binomial distribution has this mean."""
        if self.mean == 1:
            return 1.0
        # Definition 1 of the paper: 0 < g <= 2 (eta + 1) / mean.
        low, high = 1e-18, min(1.0, 2 * (self.shape + 1) / self.mean) - 1e-15
        return float(optimize.brentq(lambda g: _mean(g, self.shape) - self.mean, low, high, xtol=1e-300, rtol=1e-14))

    def number(self, uniform: float) -> int:
        """The number of trials at `uniform` in (0, 1): the inverse of the distribution function.

        The probabilities are exact but for float64's rounding, which moves the delta of the search by less than 1e-12.
        """
        if self.mean == 1 and self.shape < math.inf:
            return 1
        count, probability = self._least()
        below = probability
        # Far beyond the mean, what is left would not change `below` any more.
        while below < uniform and (count < self.mean or probability > 2.0**-80):
            probability *= self._ratio(count)
            count += 1
            below += probability
        return count

    def _least(self) -> tuple[int, float]:
        """The least number there is, and its probability."""
        if self.shape == math.inf:
            return 0, math.exp(-self.mean)
        g = self.parameter
        if self.shape == 0:
            return 1, (1 - g) / -math.log(g)
        return 1, self.shape * (1 - g) / math.expm1(-self.shape * math.log(g))

    def _ratio(self, count: int) -> float:
        """The probability of `count` + 1 over that of `count`."""
        if self.shape == math.inf:
            return self.mean / (count + 1)
        return (1 - self.parameter) * (count + self.shape) / (count + 1)


def _mean(g: float, shape: float) -> float:
    """Of the truncated negative binomial distribution."""
    odds = (1 - g) / g  # 1 / g - 1 would round where g is close to 1
    if shape == 0:
        return odds / -math.log(g)
    return shape * odds / -math.expm1(shape * math.log(g))


def selection_divergences(trial: np.ndarray, law: Law) -> np.ndarray:
    """Bound the Renyi divergences of a search at `ORDERS` from above.

    Args:
        trial: those of one trial, as `divergences` gives them.
    """
    orders = np.asarray(ORDERS, dtype=np.float64)
    mean = law.mean * (1 + _ROUNDING)
    whole = trial + math.log(mean) / (orders - 1)
    if law.shape == math.inf:
        deltas = [compute_delta(orders, trial, math.log1p(1 / (order - 1)))[0] for order in orders]
        return np.asarray(whole + mean * np.array(deltas))
    missing = -math.log(law.parameter * (1 - _ROUNDING))
    whole = whole + (1 + law.shape) * np.min((1 - 1 / orders) * trial + missing / orders)
    # A divergence never falls as its order grows.
    return np.minimum.accumulate(whole[::-1])[::-1]


def search_cost(trial: np.ndarray, law: Law, delta: float) -> Spent:
    """Bound the epsilon of a search whose trials have these divergences at `ORDERS`, from above.

    All of delta is used: a trial that leaves its plan, to which a run keeps a share of delta, releases nothing.

    Raises:
        ValueError: a divergence is no finite number, of which dp-accounting would make epsilon 0.
    """
    if not (trial.shape == (len(ORDERS),) and np.isfinite(trial).all() and (trial >= 0).all()):
        raise ValueError("the Renyi divergences of a trial are not finite numbers from 0 on")
    epsilon = float(compute_epsilon(ORDERS, selection_divergences(trial, law), delta)[0])
    return Spent(epsilon, delta, epsilon, SELECTION)


def trial_divergences(trial: Phase) -> np.ndarray:
    """Renyi divergences of a trial's steps at `ORDERS`."""
    return divergences(trial.sampling_probability, trial.noise_multiplier, trial.steps, ORDERS)


def best_of_fixed(trial: Phase, number: int, delta: float) -> Spent:
    """Bound the epsilon of the best of a number of trials that is known: that of releasing all of them."""
    return fixed_cost([trial] * number, delta)


def calibrate_search(
    *, target_epsilon: float, sampling_probability: float, steps: int, law: Law, delta: float
) -> float:
    """Find the least noise multiplier of the trials whose search costs at most the target, and within 0.1% of it.

    Raises:
        UnreachableBudgetError: the most noise there is is too little, or the least already meets the target.
    """

    def cost(noise_multiplier: float) -> float:
        trial = Phase(sampling_probability, noise_multiplier, steps)
        return search_cost(trial_divergences(trial), law, delta).epsilon

    too_little = (
        f"a search of {law.mean:g} expected trials costs more than epsilon={target_epsilon:g} at delta={delta:g} "
        "whatever the noise"
    )
    return least_noise([cost], target_epsilon, too_little)


def binding_orders(trial: np.ndarray, law: Law, delta: float) -> tuple[int, ...]:
    """The orders, of `ORDERS`, on whose divergences alone `search_cost` rests: one or two.

    Trials whose divergences are at most `trial` at these cost no more in a search, whatever they are elsewhere.
    """
    orders = np.asarray(ORDERS, dtype=np.float64)
    costs = selection_divergences(trial, law)
    order = int(compute_epsilon(ORDERS, costs, delta)[1])
    if law.shape == math.inf:
        return tuple({order, int(compute_delta(orders, trial, math.log1p(1 / (order - 1)))[1])})
    missing = -math.log(law.parameter * (1 - _ROUNDING))
    second = int(orders[np.argmin((1 - 1 / orders) * trial + missing / orders)])
    # The cost at `order` may be that of a larger one, as divergences do not fall.
    first = int(orders[np.flatnonzero(costs == costs[ORDERS.index(order)])[-1]])
    return tuple({first, second})


def noise_within(most: Mapping[int, float], *, sampling_probability: float, steps: int) -> float:
    """Find the least noise multiplier at which a trial's divergences are at most `most`, by order.

    So candidates of other batch sizes and lengths have one bound in common.

    Raises:
        UnreachableBudgetError: as `calibrate_search`.
    """
    orders, bounds = list(most), np.array(list(most.values()))

    def share(noise_multiplier: float) -> float:
        return float(np.max(divergences(sampling_probability, noise_multiplier, steps, orders) / bounds))

    return least_noise([share], 1.0, f"no noise brings {steps} steps within what a trial may cost")


def stated_cost(record: Mapping[str, Any], *, released: Phase, delta: float) -> Spent:
    """Bound the epsilon of a search from what a statement says of it.

    Args:
        record: `distribution`, `expected_trials`, `shape`, `trial` and `orders`, as `dpdist tune` writes them.
        released: the trial that was released.

    Raises:
        KeyError, TypeError, ValueError: it is no such record, or the released trial is not one that it bounds.
    """
    bound = _stated_phase(**record["trial"])
    orders = list(record["orders"])
    law, losses = Law.from_record(record), trial_divergences(bound)
    spent = search_cost(losses, law, delta)
    if not set(binding_orders(losses, law, delta)) <= set(orders):
        raise ValueError("the orders are not those that its epsilon rests on")
    own = trial_divergences(_stated_phase(released.sampling_probability, released.noise_multiplier, released.steps))
    places = [ORDERS.index(order) for order in orders]  # a ValueError where there is no such order
    if not all(own[place] <= losses[place] * (1 + _ROUNDING) for place in places):  # so that NaN is not within
        raise ValueError("the released trial costs more than any trial may")
    return spent


def _stated_phase(sampling_probability: float, noise_multiplier: float, steps: int) -> Phase:
    """A trial of a statement, which may be anything: of noise that is NaN, dp-accounting gives -inf.

    Raises:
        TypeError, ValueError: these are no such numbers.
    """
    noise = SMALLEST_NOISE_MULTIPLIER <= noise_multiplier <= LARGEST_NOISE_MULTIPLIER
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS or not 0 < sampling_probability <= 1 or not noise:
        raise ValueError("its trials have constants that make no sense")
    return Phase(sampling_probability, noise_multiplier, steps)
