"""What a plan of steps costs: epsilon, calibration of the noise, and the last step a budget allows.

The mechanism is T compositions of the Poisson-subsampled Gaussian under zero-out adjacency (one record
replaced by a null record; `REPLACE_SPECIAL` in dp-accounting), with the same epsilon as add/remove.
Two accountants of dp-accounting bound it from above: privacy loss distributions with pessimistic rounding
(Koskela et al. 2020; Doroshenko et al. 2022) and Renyi DP (Mironov et al. 2019). Both are valid upper
bounds, so the smaller is stated, which is nearly always the former.
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
# Beyond this Renyi epsilon the loss distribution gets so wide that it takes minutes and gigabytes.
_PLD_LIMIT = 100.0
_PLD_INTERVAL = 1e-4
# Integer orders have a closed form at every q, where fractional ones may fail to converge.
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
    """`steps` steps of the mechanism, with the probability that is really sampled, as accountants take it."""
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
    """Upper bound on the epsilon of `steps` steps at `delta`.

    Args:
        sampling_probability: q in (0, 1]; rounded to what `sampling` really draws.
        noise_multiplier: sigma > 0, the noise's standard deviation over the clipping norm.
        steps: T >= 0; no step costs nothing.
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
    """The smallest noise multiplier (within 1e-4, on the safe side) whose epsilon is at most the target.

    Raises:
        UnreachableBudgetError: not even sigma = 1e5 suffices, or sigma = 0.05 is more than enough.
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

    # Renyi DP is fast and close, so its answer brackets the slower search from above.
    sigma = search(_rdp_accountant, SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER, 1e-3)
    low = high = sigma
    # Where the Renyi bound passes its limit, `epsilon` states that alone, so it is what must meet the target.
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
    """The largest number of steps, at most `steps`, whose epsilon is at most the target; it may be 0."""

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
    """Epsilon over the course of a plan, cheap enough to show in a progress line.

    Known at no more than `points` step counts and rounded up to the next, so never below the truth; each point
    composes one more stride onto the one before, instead of starting anew.

    Args:
        total: the epsilon stated for all `steps`; no part of a plan is shown to cost more.
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
        """Epsilon after 1, 2, ... strides; the loss distribution of one stride is made once."""
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
        """Upper bound on the epsilon of the first `step` steps."""
        if step >= self._steps:
            return self._total
        index = -(-step // self._stride)
        while len(self._known) <= index:
            self._known.append(next(self._further))
        return min(self._known[index], self._total)
