"""What several incarnations of a run cost together.

"Seen" is what was released here. A choice that rests on `private/`, which shows what the noise hides, nothing covers.

While every step charged has the sampling probability and noise multiplier of the first plan, and no more steps are
charged than it held, the epsilon stated for that plan covers them all, whatever else was changed on seeing results and
whichever steps were abandoned: each step is dominated by the same pair of distributions however it is chosen, such
pairs compose adaptively (Zhu, Dong and Wang 2022, arXiv 2106.08567), and fewer steps lose no more.

Beyond that the plan depends on what was seen, and its loss distribution is not fixed in advance. Renyi divergences of a
*fixed* order alpha still add up: with L_t the privacy loss of everything released up to step t, and R_t the sum of the
divergences of its steps, M_t = exp((alpha - 1) (L_t - R_t)) is a nonnegative supermartingale that starts at 1, however
steps are chosen (Renyi filters and odometers: Feldman and Zrnic 2021, arXiv 2008.11193; Lecuyer 2021, 2103.01379). So
E M_t <= 1 at every stopping time. As max(0, 1 - e^-x) <= c e^((alpha - 1) x) with c = (1 - 1 / alpha)^(alpha - 1) /
alpha (Canonne et al. 2020, arXiv 2004.00010, Proposition 12), whenever one stops and whatever that rests on

    E max(0, 1 - e^(E_t - L_t)) <= k delta    for    E_t = R_t + log(c / (k delta)) / (alpha - 1).

One delta for both. Let e be the epsilon of the first plan at (1 - k) delta, and state min(e, E_t) where the steps
charged are within it, E_t elsewhere. Let A be the transcripts for which e is stated, B all others, P and Q their
densities with and without the record, and E the number stated for each. Nothing but the first plan's steps is in A: a
run that halts where it would leave the plan has the same densities there, so that the integral over A of
max(0, P - e^E Q) is at most (1 - k) delta. That over B is at most k delta by the above. So for every event S

    P(S) <= integral over S of e^E Q, + delta,

whoever chooses, on whatever was released, whether to leave, when to stop and when to read the number. Where a target
caps E that is (target, delta)-DP; elsewhere E is itself part of what is released, and the bound holds for it ex post.
It holds at each moment that is chosen so, not at all of them at once. k is `KEPT`: small, as most runs stay within
their plan, to which it costs about k / alpha in epsilon. The order is chosen with the first plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpdist.mechanism.accounting import KEPT, Spent, divergences, epsilon
from dpdist.mechanism.ledger import Ledger, Plan

#: The accountant's name where what is stated holds whenever one stops, whatever was changed on seeing releases.
ADAPTIVE = "renyi filter"


@dataclass(frozen=True)
class Phase:
    """A number of steps with one sampling probability q and noise multiplier sigma."""

    sampling_probability: float
    noise_multiplier: float
    steps: int

    def alike(self, other: Phase) -> bool:
        """Whether a step costs the same in both."""
        return replace(self, steps=other.steps) == other


def adaptive_epsilon(phases: Sequence[Phase], *, order: int, delta: float) -> float:
    """Upper bound, whenever one stops, on the epsilon of `phases`, each perhaps chosen on seeing results.

    Args:
        order: alpha > 1, chosen before the first step.
        delta: in (0, 1), that of the run; a share of `KEPT` is used.
    """
    each = ((phase.sampling_probability, phase.noise_multiplier, phase.steps) for phase in phases)
    spent = sum(float(divergences(*phase, [order])[0]) for phase in each)
    tail = math.log1p(-1 / order) - (math.log(order) + math.log(KEPT) + math.log(delta)) / (order - 1)
    return max(0.0, spent + tail) if spent else 0.0


def within(first: Phase, phases: Sequence[Phase]) -> bool:
    """Whether the epsilon of the plan `first` covers all of `phases`."""
    return all(phase.alike(first) for phase in phases) and sum(phase.steps for phase in phases) <= first.steps


def total_cost(first: Plan, before: Sequence[Phase], own: Phase) -> Spent:
    """Cost of a whole run: its first plan, the phases charged before the current incarnation, and that one's own."""
    terms, phases, plan = first.private_terms(), [*before, own], phase_of(first, first.steps)
    adaptive = adaptive_epsilon(phases, order=terms.renyi_order, delta=terms.delta)
    stated = Spent(adaptive, terms.delta, adaptive, ADAPTIVE)
    if within(plan, phases):
        q, sigma = plan.sampling_probability, plan.noise_multiplier
        fixed = epsilon(sampling_probability=q, noise_multiplier=sigma, steps=plan.steps, delta=terms.delta)
        stated = min(fixed, stated, key=lambda spent: spent.epsilon)
    return stated


def charged_phases(ledger: Ledger, incarnations: int) -> list[Phase]:
    """Charged phases of the first `incarnations` incarnations."""
    return [phase_of(plan, ledger.charged_to(plan.incarnation)) for plan in ledger.plans[:incarnations]]


def phase_of(plan: Plan, steps: int) -> Phase:
    """The phase of `steps` steps of a private plan.

    Raises:
        LedgerError: the plan adds no noise.
    """
    return Phase(plan.sampling_probability, plan.private_terms().noise_multiplier, steps)
