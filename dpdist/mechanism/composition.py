"""What several incarnations of a run cost together.

"Seen" is what was released here. A choice that rests on `private/`, which shows what the noise hides, nothing covers.

While every step charged has the sampling probability and noise multiplier of the first plan and no more steps are
charged than it held, the epsilon stated for that plan covers them all, whatever else was changed on seeing results and
whichever steps were abandoned: each step is dominated by the same pair of distributions however it is chosen, such
pairs compose adaptively (Zhu, Dong and Wang 2022, arXiv 2106.08567), and fewer steps lose no more.

Beyond that the plan itself depends on what was seen, and its loss distribution is no longer fixed in advance. Renyi
divergences of a *fixed* order alpha still add up: with L_t the privacy loss of everything released up to step t and
rho_s(alpha) the divergence of step s, exp((alpha - 1) (L_t - sum_{s<=t} rho_s(alpha))) is a nonnegative supermartingale
that starts at 1, however later steps are chosen. So by Ville's inequality, with probability 1 - delta, at *all* t

    L_t <= sum_{s<=t} rho_s(alpha) + log(1 / delta) / (alpha - 1),

and the right-hand side may serve as budget and as statement at any time (Renyi filters and odometers: Feldman and
Zrnic 2021, arXiv 2008.11193; Lecuyer 2021, arXiv 2103.01379). The order is chosen with the first plan. Whether to stay
within the first plan is a choice too: over both of its outcomes, delta is at most that of the two statements together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_accounting.rdp import RdpAccountant

from dpdist.mechanism.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    ORDERS,
    RELATION,
    SMALLEST_NOISE_MULTIPLIER,
    Spent,
    UnreachableBudgetError,
    epsilon,
    poisson_gaussian,
)
from dpdist.mechanism.ledger import Ledger, Plan

#: The accountant's name where what is stated holds at every moment, whatever was changed on seeing what was released.
ADAPTIVE = "renyi filter"


@dataclass(frozen=True)
class Phase:
    """A number of steps with one sampling probability q and noise multiplier sigma."""

    sampling_probability: float
    noise_multiplier: float
    steps: int

    def alike(self, other: Phase) -> bool:
        """Whether a step costs the same in both."""
        return (self.sampling_probability, self.noise_multiplier) == (
            other.sampling_probability,
            other.noise_multiplier,
        )


def best_order(plan: Phase, delta: float) -> int:
    """The integer Renyi order at which `plan` is cheapest; choose it before the first step, and keep it."""
    costs = _divergences(plan, ORDERS)
    return min(zip(costs, ORDERS, strict=True), key=lambda pair: pair[0] + _tail(pair[1], delta))[1]


def adaptive_epsilon(phases: Sequence[Phase], *, order: int, delta: float) -> float:
    """Upper bound, at every moment, on the epsilon of `phases`, each of which may have been chosen on seeing results.

    Args:
        order: alpha > 1, chosen before the first step.
        delta: in (0, 1), that of the first plan.
    """
    spent = sum(_divergences(phase, [order])[0] for phase in phases if phase.steps)
    return spent + _tail(order, delta) if spent else 0.0


def within(first: Phase, phases: Sequence[Phase]) -> bool:
    """Whether the epsilon of the plan `first` covers all of `phases`."""
    return all(phase.alike(first) for phase in phases) and sum(phase.steps for phase in phases) <= first.steps


def total_cost(first: Plan, before: Sequence[Phase], own: Phase) -> Spent:
    """Cost of a whole run: its first plan, the phases charged before the current incarnation, and that one's own."""
    terms = first.private_terms()
    if within(phase_of(first, first.steps), [*before, own]):
        return epsilon(
            sampling_probability=first.sampling_probability,
            noise_multiplier=terms.noise_multiplier,
            steps=first.steps,
            delta=terms.delta,
        )
    adaptive = adaptive_epsilon([*before, own], order=terms.renyi_order, delta=terms.delta)
    return Spent(adaptive, terms.delta, adaptive, ADAPTIVE)


def charged_phases(ledger: Ledger, incarnations: int) -> list[Phase]:
    """Charged phases of the first `incarnations` incarnations."""
    return [phase_of(plan, ledger.charged_to(plan.incarnation)) for plan in ledger.plans[:incarnations]]


def phase_of(plan: Plan, steps: int) -> Phase:
    """The phase of `steps` steps of a private plan.

    Raises:
        LedgerError: the plan adds no noise.
    """
    return Phase(plan.sampling_probability, plan.private_terms().noise_multiplier, steps)


def affordable_further_steps(
    before: Sequence[Phase], further: Phase, *, target_epsilon: float, order: int, delta: float
) -> int:
    """How many steps of `further` fit under the target after `before`, by `adaptive_epsilon`; possibly 0."""
    left = _left(before, target_epsilon, order, delta)
    each = _divergences(replace(further, steps=1), [order])[0]
    if left <= 0:
        return 0
    steps = further.steps if each * further.steps <= left else int(left / each)

    def fits(steps: int) -> bool:
        return adaptive_epsilon([*before, replace(further, steps=steps)], order=order, delta=delta) <= target_epsilon

    while steps > 0 and not fits(steps):  # the quotient was rounded
        steps -= 1
    return steps


def calibrate_further_steps(
    before: Sequence[Phase],
    *,
    sampling_probability: float,
    steps: int,
    target_epsilon: float,
    order: int,
    delta: float,
) -> float:
    """The smallest noise multiplier (within a part in 1e4, on the safe side) for `steps` more steps under the target.

    Raises:
        UnreachableBudgetError: what was spent leaves too little for any noise, or no noise at all would do.
    """
    left = _left(before, target_epsilon, order, delta)

    def cost(sigma: float) -> float:
        return _divergences(Phase(sampling_probability, sigma, steps), [order])[0]

    low, high = SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
    if cost(high) > left:
        raise UnreachableBudgetError(
            f"what was charged so far costs {adaptive_epsilon(before, order=order, delta=delta):.4g} at "
            f"delta={delta:g}, which leaves too little of epsilon={target_epsilon:g} for {steps} more steps, "
            "whatever the noise"
        )
    if cost(low) <= left:
        raise UnreachableBudgetError(
            f"noise_multiplier={low:g} already costs less than epsilon={target_epsilon:g}: the target asks for no real "
            "privacy"
        )
    while high > low * (1 + 1e-4):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= left else (middle, high)
    return high


def _left(before: Sequence[Phase], target_epsilon: float, order: int, delta: float) -> float:
    """The divergence that may still be spent; negative where the target is passed."""
    spent = sum(_divergences(phase, [order])[0] for phase in before if phase.steps)
    return target_epsilon - _tail(order, delta) - spent


def _tail(order: int, delta: float) -> float:
    return math.log(1 / delta) / (order - 1)


def _divergences(phase: Phase, orders: Sequence[int]) -> list[float]:
    """Renyi divergence of all steps of a phase at each order (Mironov et al. 2019), the larger of both directions."""
    accountant = RdpAccountant(orders=list(orders), neighboring_relation=RELATION)
    accountant.compose(poisson_gaussian(phase.sampling_probability, phase.noise_multiplier, phase.steps))
    return [float(value) for value in accountant.rdp]
