"""What several runs over the same records cost together, such as those of a sweep.

Whoever chooses among runs has seen the results of all: the choice costs what all of them cost. Two bounds hold for it.

Where all runs were asked for before any result of one was seen, and each stays within its first plan, the pairs of
distributions that dominate their steps are fixed in advance. Then the losses of all steps add up (Zhu, Dong and Wang
2022, arXiv 2106.08567), whatever else of a step depends on what was released before it: a composition by privacy loss
distributions, at (1 - k) delta.

Otherwise steps were added on seeing results. The Renyi filter of `dpdist.mechanism.composition` covers these too, at
k delta, with the order that the first run chose before its first step: its proof does not ask to which run a step
belongs. As there, the smaller of both bounds may be stated where both hold, and one delta covers it.

The plain sum of the runs' epsilons holds too, at the sum of their deltas, whenever one stops: with P and Q the
densities with and without the record of two runs, a b - c d <= max(0, a - c) b + min(a, c) max(0, b - d) for a, b =
P1, P2 and c, d = e^E1 Q1, e^E2 Q2, also where E2 rests on what the first run has released. Stated where it is smaller,
at that sum and the k delta of the filter it was compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from dpdist.mechanism.accounting import INTERVALS, KEPT, ORDERS, Spent, divergences, epsilon
from dpdist.mechanism.composition import ADAPTIVE, Phase, adaptive_epsilon, charged_phases, phase_of, within
from dpdist.mechanism.ledger import Ledger

#: Delta that the round-off of a composition by Fourier transforms is worth, a step: see `dpdist.mechanism.accounting`.
_ROUND_OFF = 16 * 2.0**-53
#: The accountant's name where epsilons and deltas are added.
SUM = "sum"


@dataclass(frozen=True, kw_only=True)
class Charges:
    """What one private run has released and has planned."""

    #: Its first plan, whole.
    first: Phase
    #: What its earlier incarnations are charged, and the whole plan of its current one.
    phases: tuple[Phase, ...]
    delta: float
    #: The Renyi order that was chosen with the first plan.
    order: int

    @classmethod
    def of_ledger(cls, ledger: Ledger) -> Charges:
        """Those of a run with a plan.

        Raises:
            LedgerError: a plan of it adds no noise.
        """
        first, current = ledger.plans[0], ledger.plans[-1]
        terms = first.private_terms()
        before = charged_phases(ledger, current.incarnation)
        return cls(
            first=phase_of(first, first.steps),
            phases=(*before, phase_of(current, current.steps - current.start)),
            delta=terms.delta,
            order=terms.renyi_order,
        )

    @property
    def kept_to_plan(self) -> bool:
        """Whether the epsilon of the first plan covers all of it."""
        return within(self.first, self.phases)

    def alone(self) -> Spent:
        """What the run costs by itself, as `dpdist.mechanism.composition.total_cost` of its plans."""
        return _alone(self)


@cache
def _alone(run: Charges) -> Spent:
    return composed([run], delta=run.delta, orders=[run.order], at_once=True)


def cost_together(ledgers: Sequence[Ledger], *, at_once: bool) -> Spent:
    """Bound the epsilon of everything that the runs of these ledgers have released and have planned, from above.

    Args:
        ledgers: of private runs, at least one, each with a plan; in the order in which they were asked for.
        at_once: whether all were asked for before any result of one was seen.

    Returns:
        epsilon at the largest delta of the runs.
    """
    runs = [Charges.of_ledger(ledger) for ledger in ledgers]
    return composed(runs, delta=max(run.delta for run in runs), orders=[runs[0].order], at_once=at_once)


def composed(runs: Sequence[Charges], *, delta: float, orders: Sequence[int], at_once: bool) -> Spent:
    """Bound the epsilon of all runs at `delta` from above, by distributions or the filter.

    Args:
        orders: the Renyi order chosen before the first step of all; several where it is not known which was.
        at_once: whether all were asked for before any result of one was seen.
    """
    phases = [phase for run in runs for phase in run.phases]
    adaptive = max(adaptive_epsilon(phases, order=order, delta=delta) for order in orders)
    stated = Spent(adaptive, delta, adaptive, ADAPTIVE)
    if not at_once or not all(run.kept_to_plan for run in runs):
        return stated
    return min(fixed_cost([run.first for run in runs], delta), stated, key=lambda spent: spent.epsilon)


def joint_cost(
    runs: Sequence[Charges], stated: Sequence[Spent], *, delta: float, orders: Sequence[int], at_once: bool
) -> Spent:
    """The least of the bounds that hold for all runs: never above the sum of theirs, never below the largest.

    Args:
        stated: what each of the runs costs by itself, at its own delta.
        delta: where the plain sum is smaller, that is stated, at a larger one.
        orders, at_once: as in `composed`.
    """
    if len(runs) == 1:
        return stated[0]
    cost = composed(runs, delta=delta, orders=orders, at_once=at_once)
    least = max((one.epsilon for one in stated if one.delta >= delta), default=0.0)
    cost = replace(cost, epsilon=max(cost.epsilon, least))
    total = sum(one.epsilon for one in stated)
    if total >= cost.epsilon:
        return cost
    deltas = sum(one.delta for one in stated) + KEPT * delta
    return Spent(total, deltas, sum(one.epsilon_rdp for one in stated), SUM)


def wall_cost(runs: Sequence[Charges], *, order: int, delta: float) -> float:
    """Bound the epsilon, at `delta`, of runs that are added one by one, each perhaps on seeing what others released.

    The filter has k delta, and (1 - k) delta is for the plain sum of the runs' epsilons, which holds as long as their
    deltas fit in, each whole: that a run has kept to its plan is an outcome of it too, and excuses nothing. The smaller
    is stated: one delta covers both. (Runs may go on side by side: composition holds for concurrent ones too, Haney et
    al. 2023.)

    A single run that keeps to its plan needs (1 - k) of its own delta, and the filter covers whatever else happens, as
    within one run (`dpdist.mechanism.composition`): it costs what it states also where its delta is the whole one.

    Args:
        order, delta: chosen before the first of them began.
    """
    adaptive = adaptive_epsilon([phase for run in runs for phase in run.phases], order=order, delta=delta)
    alone = [run.alone() for run in runs]
    kept = len(runs) == 1 and runs[0].delta <= delta and runs[0].kept_to_plan and alone[0].accountant != ADAPTIVE
    if not kept and math.fsum(run.delta for run in runs) > (1 - KEPT) * delta * (1 + 1e-12):
        return adaptive
    return min(adaptive, math.fsum(spent.epsilon for spent in alone))


def added(stated: Sequence[Spent]) -> Spent:
    """The sum of what each costs by itself: holds whatever they are, also for a search."""
    epsilon, delta, rdp = (sum(getattr(one, name) for one in stated) for name in ("epsilon", "delta", "epsilon_rdp"))
    return Spent(epsilon, delta, rdp, SUM)


def fixed_cost(phases: Sequence[Phase], delta: float) -> Spent:
    """Bound the epsilon of phases that were all fixed before the first step, from above.

    As `dpdist.mechanism.accounting.epsilon`, which it asks where all steps are alike.
    """
    steps: dict[tuple[float, float], int] = {}
    for phase in phases:
        kind = phase.sampling_probability, phase.noise_multiplier
        steps[kind] = steps.get(kind, 0) + phase.steps
    if len(steps) == 1:
        ((q, sigma), total), *_ = steps.items()
        return epsilon(sampling_probability=q, noise_multiplier=sigma, steps=total, delta=delta)
    losses = sum(divergences(q, sigma, total, ORDERS) for (q, sigma), total in steps.items())
    fixed = (1 - KEPT) * delta
    rdp, widest = (float(compute_epsilon(ORDERS, losses, tail)[0]) for tail in (fixed, 1e-15))
    reach = max(10 / sigma + 0.5 / sigma**2 for _, sigma in steps)
    interval = max(1e-4, widest / INTERVALS, reach / (2 * INTERVALS))
    pld = _pld_epsilon(steps, fixed, interval)
    return Spent(min(pld, rdp), delta, rdp, "pld" if pld <= rdp else "rdp")


def _pld_epsilon(steps: dict[tuple[float, float], int], delta: float, interval: float) -> float:
    """By privacy loss distributions on a grid of `interval`; infinite where their round-off is too large."""
    off = sum(steps.values()) * _ROUND_OFF
    if off > delta / 10:
        return math.inf
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=interval)
    try:
        for (q, sigma), total in steps.items():
            accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), total)
        return float(accountant.get_epsilon(delta - off)) * (1 + 4e-9)
    except OverflowError:  # losses beyond the largest float
        return math.inf
