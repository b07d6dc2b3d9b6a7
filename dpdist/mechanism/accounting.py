"""Privacy accounting: epsilon of a number of steps, noise calibration, and how many steps a budget allows.

The mechanism is the T-fold composition of the Poisson-subsampled Gaussian under zero-out adjacency (one record replaced
by a null record; `REPLACE_SPECIAL` in dp-accounting), which has the same epsilon as add/remove. Two accountants of
dp-accounting bound epsilon from above: privacy loss distributions (PLD) with pessimistic rounding (Koskela et al. 2020;
Doroshenko et al. 2022) and Renyi DP (RDP; Mironov et al. 2019). Both bounds are valid, so we state the smaller one,
which is nearly always PLD's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant

from dpdist.mechanism.sampling import inclusion_probability

ADJACENCY = "zero-out: one training record replaced by a null record"
SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.05, 1e5
# Above this RDP epsilon the privacy loss distribution is so wide that PLD takes minutes and gigabytes.
_PLD_LIMIT = 100.0
_PLD_INTERVAL = 1e-4
# Integer orders have a closed form at every q; the series for fractional orders may fail to converge.
ORDERS = [*range(2, 65), *range(68, 129, 4), 160, 192, 256, 512, 1024, 2048]
RELATION = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon at `delta`, and which accountant gave it (`pld` or `rdp`)."""

    epsilon: float
    delta: float
    epsilon_rdp: float
    accountant: str


class UnreachableBudgetError(ValueError):
    """No noise multiplier (or no step) meets the target epsilon."""


def poisson_gaussian(sampling_probability: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """Describe `steps` steps to dp-accounting, with the sampling probability rounded to what `sampling` draws with."""
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(inclusion_probability(sampling_probability), gaussian)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def _rdp_epsilon(event: dp_accounting.DpEvent, delta: float) -> float:
    return float(_rdp_accountant().compose(event).get_epsilon(delta))


def _rdp_accountant() -> RdpAccountant:
    return RdpAccountant(orders=ORDERS, neighboring_relation=RELATION)


def _pld_accountant() -> PLDAccountant:
    return PLDAccountant(neighboring_relation=RELATION, value_discretization_interval=_PLD_INTERVAL)


def epsilon(*, sampling_probability: float, noise_multiplier: float, steps: int, delta: float) -> Spent:
    """Bound the epsilon of `steps` steps at `delta` from above.

    Args:
        sampling_probability: q in (0, 1]; rounded to the probability that `sampling` draws with.
        noise_multiplier: sigma > 0, the noise's standard deviation divided by the clipping norm.
        steps: T >= 0; zero steps cost nothing.
        delta: in (0, 1).

    Raises:
        ValueError: an argument out of range.
    """
    if not noise_multiplier > 0:
        raise ValueError(f"the noise multiplier must be positive, not {noise_multiplier!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), not {delta!r}")
    if steps < 0:
        raise ValueError(f"the number of steps must be 0 or more, not {steps!r}")
    if steps == 0:
        return Spent(0.0, delta, 0.0, "pld")
    event = poisson_gaussian(sampling_probability, noise_multiplier, steps)
    rdp = _rdp_epsilon(event, delta)
    if rdp > _PLD_LIMIT:
        return Spent(rdp, delta, rdp, "rdp")
    pld = float(_pld_accountant().compose(event).get_epsilon(delta))
    return Spent(min(pld, rdp), delta, rdp, "pld" if pld <= rdp else "rdp")


def calibrate(*, target_epsilon: float, sampling_probability: float, steps: int, delta: float) -> float:
    """Find the smallest noise multiplier, to within 1e-4, whose epsilon is at most the target.

    Raises:
        UnreachableBudgetError: sigma = 1e5 is too little noise, or sigma = 0.05 already meets the target.
        ValueError: an argument out of range.
    """

    def cost(noise_multiplier: float) -> float:
        return epsilon(
            sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps, delta=delta
        ).epsilon

    if not target_epsilon > 0:
        raise ValueError(f"the target epsilon must be positive, not {target_epsilon!r}")
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {steps!r}")
    if cost(LARGEST_NOISE_MULTIPLIER) > target_epsilon:
        raise UnreachableBudgetError(
            f"even noise_multiplier={LARGEST_NOISE_MULTIPLIER:g} costs more than "
            f"epsilon={target_epsilon:g} at delta={delta:g} over {steps} steps"
        )
    if _rdp_epsilon(poisson_gaussian(sampling_probability, SMALLEST_NOISE_MULTIPLIER, steps), delta) <= target_epsilon:
        raise UnreachableBudgetError(
            f"noise_multiplier={SMALLEST_NOISE_MULTIPLIER:g} already costs less than "
            f"epsilon={target_epsilon:g}: the target asks for no real privacy"
        )

    def pld_epsilon(sigma: float) -> float:
        return float(_pld_accountant().compose(poisson_gaussian(sampling_probability, sigma, steps)).get_epsilon(delta))

    def search(fresh: Callable[[], dp_accounting.PrivacyAccountant], low: float, high: float, tol: float) -> float:
        return dp_accounting.calibrate_dp_mechanism(
            fresh,
            lambda sigma: poisson_gaussian(sampling_probability, sigma, steps),
            target_epsilon,
            delta,
            dp_accounting.ExplicitBracketInterval(low, high),
            tol=tol,
        )

    # RDP is fast and needs slightly more noise than PLD, so its answer is the upper bracket of PLD's slower search.
    sigma = search(_rdp_accountant, SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER, 1e-3)
    low = high = sigma
    # Above _PLD_LIMIT `epsilon` states the RDP bound alone, so PLD is searched only for targets well below it.
    while target_epsilon <= _PLD_LIMIT / 2 and pld_epsilon(low) <= target_epsilon:
        low, high = low / 1.3, low
    if low < high:
        sigma = search(_pld_accountant, low, high, 1e-5 * max(1.0, sigma))
    while cost(sigma) > target_epsilon:
        sigma *= 1 + 1e-5
    return sigma


def affordable_steps(
    *, target_epsilon: float, sampling_probability: float, noise_multiplier: float, steps: int, delta: float
) -> int:
    """Find the largest number of steps, from 0 to `steps`, whose epsilon is at most the target."""

    def fits(count: int) -> bool:
        spent = epsilon(
            sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=count, delta=delta
        )
        return spent.epsilon <= target_epsilon

    if fits(steps):
        return steps
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class EpsilonCurve:
    """Epsilon as a function of the steps taken so far, cheap enough for a progress line.

    It is computed at no more than `points` step counts; in between, the value of the next one is returned, which is an
    upper bound. Each point composes one more stride onto the point before.

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
        points: int = 20,
    ) -> None:
        self._stride = max(1, -(-steps // points))
        self._steps, self._delta, self._total = steps, delta, total
        self._known = [0.0]
        self._further = self._epsilons(inclusion_probability(sampling_probability), noise_multiplier)

    def _epsilons(self, q: float, sigma: float) -> Iterator[float]:
        """Yield epsilon after 1, 2, ... strides; the loss distribution of one stride is computed once."""
        if self._total > _PLD_LIMIT:
            accountant = _rdp_accountant()
            while True:
                accountant.compose(poisson_gaussian(q, sigma, self._stride))
                yield float(accountant.get_epsilon(self._delta))
        one = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=_PLD_INTERVAL)
        stride = one.self_compose(self._stride)
        spent = stride
        while True:
            yield float(spent.get_epsilon_for_delta(self._delta))
            spent = spent.compose(stride)

    def at(self, step: int) -> float:
        """Bound the epsilon of the first `step` steps from above."""
        if step >= self._steps:
            return self._total
        index = -(-step // self._stride)
        while len(self._known) <= index:
            self._known.append(next(self._further))
        return min(self._known[index], self._total)
