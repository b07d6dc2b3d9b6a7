"""Searches for a plan: the least noise, the most steps or the best order for a target, and epsilon as a run goes on.

Nothing that a guarantee rests on: whatever these find, `accounting.epsilon` and `composition.total_cost` state what it
costs, and they search nothing but those two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dpdist.mechanism.accounting import (
    INTERVALS,
    LARGEST_NOISE_MULTIPLIER,
    ORDERS,
    SMALLEST_NOISE_MULTIPLIER,
    epsilon,
)
from dpdist.mechanism.composition import Phase, adaptive_epsilon

#: A calibrated plan costs its target to within this part, unless epsilon jumps there.
_CLOSE = 2e-4
#: Relative width of the interval of noise multipliers in which epsilon is taken to jump.
_JUMP = 1e-6
#: Intervals of the accountant's grid for a number that is shown, or a first search, and not stated.
_COARSE = 2**13, 2**16
#: At how many step counts `EpsilonCurve` computes epsilon at most; each takes a tenth of a second or more.
_POINTS = 20


class UnreachableBudgetError(ValueError):
    """No noise multiplier (or no step) meets the target epsilon."""


def calibrate(*, target_epsilon: float, sampling_probability: float, steps: int, delta: float) -> float:
    """Find the least noise multiplier whose epsilon is at most the target, and within 0.1% of it.

    Raises:
        UnreachableBudgetError: the most noise there is is too little, or the least already meets the target.
        ValueError: an argument out of range.
    """

    def cost(noise_multiplier: float, intervals: int) -> float:
        return epsilon(
            sampling_probability=sampling_probability,
            noise_multiplier=noise_multiplier,
            steps=steps,
            delta=delta,
            intervals=intervals,
        ).epsilon

    if not target_epsilon > 0:
        raise ValueError(f"the target epsilon must be positive, not {target_epsilon!r}")
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {steps!r}")
    return least_noise(
        [partial(cost, intervals=intervals) for intervals in (*_COARSE, INTERVALS)],
        target_epsilon,
        f"even noise_multiplier={LARGEST_NOISE_MULTIPLIER:g} costs more than epsilon={target_epsilon:g} at "
        f"delta={delta:g} over {steps} steps",
    )


def calibrate_further_steps(
    before: Sequence[Phase],
    *,
    sampling_probability: float,
    steps: int,
    target_epsilon: float,
    order: int,
    delta: float,
) -> float:
    """Find the least noise multiplier for `steps` more steps under the target, as `calibrate` does.

    Raises:
        UnreachableBudgetError: what was spent leaves too little for any noise, or no noise at all would do.
    """

    def cost(noise_multiplier: float) -> float:
        further = Phase(sampling_probability, noise_multiplier, steps)
        return adaptive_epsilon([*before, further], order=order, delta=delta)

    return least_noise(
        [cost],
        target_epsilon,
        f"what was charged so far costs {adaptive_epsilon(before, order=order, delta=delta):.4g} at delta={delta:g}, "
        "by the Renyi filter, which a run that goes on otherwise than planned needs, and "
        f"which leaves too little of epsilon={target_epsilon:g} for {steps} more steps, whatever the noise",
    )


def least_noise(costs: Sequence[Callable[[float], float]], target: float, too_little: str) -> float:
    """Find the least noise multiplier whose cost, by the last of `costs`, is at most `target`, and within 0.1% of it.

    Args:
        costs: functions of a noise multiplier that fall as it grows; quick, rough ones before the last say where.
        too_little: what the error says where the most noise there is costs more.

    Raises:
        UnreachableBudgetError: it does, or the least noise there is already meets the target.
    """
    low, high = SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
    if (at_high := costs[-1](high)) > target:
        raise UnreachableBudgetError(too_little)
    if (at_low := costs[-1](low)) <= target:
        raise UnreachableBudgetError(
            f"noise_multiplier={low:g} already costs less than epsilon={target:g}: the target asks for no real privacy"
        )
    about = high
    for cost in costs:
        ends = _Bracket(target, low, at_low, high, at_high)
        for factor in (1.0, 1 / 1.0005, 1 / 1.02, 1.02):
            if ends.low < about * factor < ends.high and not ends.closed:
                ends.narrow(about * factor, cost)
        ends.close(cost)
        about = ends.high
    return about


@dataclass
class _Bracket:
    """Two noise multipliers between which the cost passes the target."""

    target: float
    low: float
    at_low: float
    high: float
    at_high: float

    @property
    def closed(self) -> bool:
        """Whether the upper end costs the target, near enough, or there is nothing between the two."""
        return self.at_high >= self.target * (1 - _CLOSE) or self.high <= self.low * (1 + _JUMP)

    def narrow(self, noise_multiplier: float, cost: Callable[[float], float]) -> None:
        """Compute the cost of one in between, which replaces the end on its side of the target."""
        spent = cost(noise_multiplier)
        if spent <= self.target:
            self.high, self.at_high = noise_multiplier, spent
        else:
            self.low, self.at_low = noise_multiplier, spent

    def close(self, cost: Callable[[float], float]) -> None:
        """Search on logarithmic scales, by turns along the secant and half-way."""
        halve = False
        while not self.closed:
            share = 0.5
            if not halve and self.at_high > 0:
                # Aim a little below the target, so that the point found can be taken.
                share = math.log(self.at_low / (self.target * (1 - _CLOSE / 2))) / math.log(self.at_low / self.at_high)
            self.narrow(self.low * (self.high / self.low) ** share, cost)
            halve = not halve


def affordable_steps(
    *, target_epsilon: float, sampling_probability: float, noise_multiplier: float, steps: int, delta: float
) -> int:
    """Find the largest number of steps, from 0 to `steps`, whose epsilon is at most the target."""

    def fits(count: int) -> bool:
        spent = epsilon(
            sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=count, delta=delta
        )
        return spent.epsilon <= target_epsilon

    return _most(fits, steps)


def affordable_further_steps(
    before: Sequence[Phase], further: Phase, *, target_epsilon: float, order: int, delta: float
) -> int:
    """Find how many steps of `further` fit under the target after `before`, by `adaptive_epsilon`; possibly 0."""

    def fits(count: int) -> bool:
        phases = [*before, replace(further, steps=count)]
        return adaptive_epsilon(phases, order=order, delta=delta) <= target_epsilon

    return _most(fits, further.steps)


def _most(fits: Callable[[int], bool], steps: int) -> int:
    if fits(steps):
        return steps
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def best_order(plan: Phase, delta: float) -> int:
    """The integer Renyi order at which `plan` is cheapest; to be chosen before the first step, and kept."""
    return min(ORDERS, key=lambda order: adaptive_epsilon([plan], order=order, delta=delta))


def stride_of(steps: int, points: int = _POINTS) -> int:
    """The distance of the step counts at which `EpsilonCurve` computes epsilon."""
    return max(1, -(-steps // points))


class EpsilonCurve:
    """Epsilon as a function of the steps taken so far, cheap enough for a progress line.

    It is computed at no more than `points` step counts, when one is asked for; in between, the value of the next one is
    returned, which is an upper bound.

    Args:
        total: the epsilon stated for all `steps`; the curve never exceeds it.
        points: at how many step counts epsilon is computed at most.
    """

    def __init__(
        self,
        *,
        sampling_probability: float,
        noise_multiplier: float,
        steps: int,
        delta: float,
        total: float,
        points: int = _POINTS,
    ) -> None:
        self._stride = stride_of(steps, points)
        self._steps, self._delta, self._total = steps, delta, total
        self._plan = Phase(sampling_probability, noise_multiplier, steps)
        self._known: dict[int, float] = {}

    def at(self, step: int) -> float:
        """Bound the epsilon of the first `step` steps from above."""
        if step >= self._steps:
            return self._total
        upto = -(-step // self._stride) * self._stride
        if upto not in self._known:
            spent = epsilon(
                sampling_probability=self._plan.sampling_probability,
                noise_multiplier=self._plan.noise_multiplier,
                steps=upto,
                delta=self._delta,
                intervals=_COARSE[0],
            )
            self._known[upto] = min(spent.epsilon, self._total)
        return self._known[upto]
