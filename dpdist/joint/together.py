"""What several runs over the same records cost together, such as those of a sweep.

Whoever chooses among runs has seen the results of all: the choice costs what all of them cost. Two bounds hold for it.

Where all runs were asked for before any result of one was seen, and each stays within its first plan, the pairs of
distributions that dominate their steps are fixed in advance. Then the losses of all steps add up (Zhu, Dong and Wang
2022, arXiv 2106.08567), whatever else of a step depends on what was released before it: a composition by privacy loss
distributions, at (1 - k) delta.

Otherwise steps were added on seeing results. The Renyi filter of `dpdist.mechanism.composition` covers these too, at
k delta, with the order that the first run chose before its first step: its proof does not ask to which run a step
belongs. As there, the smaller of both bounds may be stated where both hold, and one delta covers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from dpdist.mechanism.accounting import INTERVALS, KEPT, ORDERS, Spent, divergences, epsilon
from dpdist.mechanism.composition import ADAPTIVE, Phase, adaptive_epsilon, charged_phases, phase_of, within
from dpdist.mechanism.ledger import Ledger

#: Delta that the round-off of a composition by Fourier transforms is worth, a step: see `dpdist.mechanism.accounting`.
_ROUND_OFF = 16 * 2.0**-53


def cost_together(ledgers: Sequence[Ledger], *, at_once: bool) -> Spent:
    """Bound the epsilon of everything that the runs of these ledgers have released and have planned, from above.

    Args:
        ledgers: of private runs, at least one, each with a plan; in the order in which they were asked for.
        at_once: whether all were asked for before any result of one was seen.

    Returns:
        epsilon at the largest delta of the runs.
    """
    deltas, orders = zip(*((run.plans[0].private_terms().delta, _order(run)) for run in ledgers), strict=True)
    delta, plans, done = max(deltas), [], []
    for ledger in ledgers:
        first, current = ledger.plans[0], ledger.plans[-1]
        plan = phase_of(first, first.steps)
        phases = [*charged_phases(ledger, current.incarnation), phase_of(current, current.steps - current.start)]
        at_once = at_once and within(plan, phases)
        plans.append(plan)
        done += phases
    adaptive = adaptive_epsilon(done, order=orders[0], delta=delta)
    stated = Spent(adaptive, delta, adaptive, ADAPTIVE)
    return min(fixed_cost(plans, delta), stated, key=lambda spent: spent.epsilon) if at_once else stated


def _order(ledger: Ledger) -> int:
    return ledger.plans[0].private_terms().renyi_order


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
