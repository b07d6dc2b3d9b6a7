"""What a search costs: against dp-accounting, against an exact computation, and beside what a fixed number costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from dpdist.joint.selection import (
    SELECTION,
    SHAPES,
    Law,
    best_of_fixed,
    binding_orders,
    calibrate_search,
    noise_within,
    search_cost,
    selection_divergences,
    stated_cost,
    trial_divergences,
)
from dpdist.mechanism.accounting import ORDERS, epsilon
from dpdist.mechanism.composition import Phase

DIGITS = Phase(512 / 1437, 3.537, 60)
#: As a statement has it.
TRIAL: dict[str, Any] = {"sampling_probability": 0.3, "noise_multiplier": 4.0, "steps": 60}
LAWS = [Law(mean, shape) for mean in (1.0, 1.5, 8.0, 64.0) for shape in (*SHAPES.values(), 0.5, 3.0)]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}, {law.mean:g}")
@pytest.mark.parametrize("trial", [DIGITS, Phase(0.01, 1.415, 1000)], ids=["digits", "small rate"])
def test_it_costs_what_dp_accounting_says_and_never_less(trial: Phase, law: Law) -> None:
    step = PoissonSampledDpEvent(trial.sampling_probability, GaussianDpEvent(trial.noise_multiplier))
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(RepeatAndSelectDpEvent(SelfComposedDpEvent(step, trial.steps), law.mean, law.shape))
    theirs = accountant.get_epsilon(1e-5)
    ours = search_cost(trial_divergences(trial), law, 1e-5)
    assert theirs <= ours.epsilon <= theirs * (1 + 1e-6)
    assert (ours.accountant, ours.delta) == (SELECTION, 1e-5)


@pytest.mark.parametrize("law", [Law(3.0, shape) for shape in (0.0, 0.5, 1.0, math.inf)], ids=lambda law: law.name)
@pytest.mark.parametrize("level", [0.2, 2.0])
def test_it_bounds_the_exact_divergence_of_a_search_over_yes_and_no(law: Law, level: float) -> None:
    """A trial says yes with a probability that differs between the datasets; the search says yes if any trial does."""
    likely, unlikely = math.exp(level) / (1 + math.exp(level)), 1 / (1 + math.exp(level))
    numbers = probabilities(law)

    def says_no(yes: float) -> float:
        return float(sum(p * (1 - yes) ** k for k, p in numbers.items()))

    orders = np.asarray(ORDERS, dtype=np.float64)
    trial = np.array([divergence((likely, unlikely), (unlikely, likely), order) for order in orders])
    bound = selection_divergences(trial, law)
    for one, other in ((likely, unlikely), (unlikely, likely)):
        found = [(1 - says_no(p), says_no(p)) for p in (one, other)]
        for order, most in zip(orders, bound, strict=True):
            assert divergence(*found, order) <= most + 1e-9


def divergence(p: tuple[float, float], q: tuple[float, float], order: float) -> float:
    """The Renyi divergence of two distributions over two outcomes."""
    each = [order * math.log(a) - (order - 1) * math.log(b) for a, b in zip(p, q, strict=True)]
    return float(np.logaddexp(*each)) / (order - 1)


def probabilities(law: Law, points: int = 40_000) -> dict[int, float]:
    """How often each number comes out at evenly spaced uniform numbers."""
    numbers, counts = np.unique(
        [law.number((i + 0.5) / points) for i in range(0, points)],
        return_counts=True,
    )
    return {int(k): float(count) / points for k, count in zip(numbers, counts, strict=True)}


def test_the_number_of_trials_has_the_distribution_that_is_charged() -> None:
    poisson = probabilities(Law(8.0, math.inf))
    for k in range(20):
        assert poisson[k] == pytest.approx(math.exp(-8) * 8**k / math.factorial(k), abs=5e-5)
    geometric = probabilities(Law(8.0, 1.0))
    for k in range(1, 20):
        assert geometric[k] == pytest.approx(7 ** (k - 1) / 8**k, abs=5e-5)
    law = Law(8.0, 0.0)
    for k, p in list(probabilities(law).items())[:20]:
        assert p == pytest.approx((1 - law.parameter) ** k / (k * -math.log(law.parameter)), abs=5e-5)


@pytest.mark.parametrize("law", [*LAWS, Law(500.0, math.inf)], ids=lambda law: f"{law.name}, {law.mean:g}")
def test_the_number_of_trials_has_the_mean_that_was_asked_for(law: Law) -> None:
    points = 4000
    mean = np.mean([law.number((i + 0.5) / points) for i in range(points)])
    assert mean == pytest.approx(law.mean, rel=0.02)


def test_a_search_costs_more_than_a_run_and_less_than_everything_that_it_tried() -> None:
    one = epsilon(sampling_probability=512 / 1437, noise_multiplier=3.537, steps=60, delta=1e-4)
    search = search_cost(trial_divergences(DIGITS), Law(8.0, 1.0), 1e-4)
    fixed = best_of_fixed(DIGITS, 8, 1e-4)
    assert one.epsilon < search.epsilon < fixed.epsilon
    eightfold = epsilon(sampling_probability=512 / 1437, noise_multiplier=3.537, steps=8 * 60, delta=1e-4)
    assert fixed == eightfold, "the best of a known number costs what all of them cost"


def test_noise_is_calibrated_for_the_whole_search() -> None:
    law = Law(8.0, 1.0)
    sigma = calibrate_search(target_epsilon=3.0, sampling_probability=0.3, steps=60, law=law, delta=1e-4)
    spent = search_cost(trial_divergences(Phase(0.3, sigma, 60)), law, 1e-4)
    assert 3.0 * (1 - 1e-3) <= spent.epsilon <= 3.0


@pytest.mark.parametrize("law", [Law(8.0, shape) for shape in SHAPES.values()], ids=lambda law: law.name)
@pytest.mark.parametrize(("q", "steps"), [(0.1, 60), (0.3, 200), (0.9, 10)])
def test_a_candidate_of_another_rate_or_length_never_makes_the_search_cost_more(q: float, steps: int, law: Law) -> None:
    most = trial_divergences(Phase(0.3, 4.0, 60))
    orders = [ORDERS.index(order) for order in binding_orders(most, law, 1e-5)]
    sigma = noise_within({ORDERS[at]: most[at] for at in orders}, sampling_probability=q, steps=steps)
    own = trial_divergences(Phase(q, sigma, steps))
    assert (own[orders] > most[orders] * 0.998).any(), "it has more noise than it needs"
    # A bound of both kinds of trial, at every order.
    mixed = search_cost(np.maximum(most, own), law, 1e-5)
    assert mixed.epsilon == search_cost(most, law, 1e-5).epsilon


@pytest.mark.parametrize(
    ("mean", "shape"),
    [(0.5, 1.0), (math.nan, 1.0), (501.0, 1.0), (8.0, -0.5), (8.0, math.nan), (8.0, 1e18), (1 + 1e-12, 0.0)],
)
def test_laws_that_no_theorem_covers_are_refused(mean: float, shape: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Law(mean, shape)


@pytest.mark.parametrize(("mean", "shape"), [(1 + 1e-6, 0.0), (1 + 1e-6, 1e6), (500.0, 1e6), (500.0, 0.0)])
def test_laws_at_the_ends_of_what_is_allowed_have_the_mean_that_is_charged(mean: float, shape: float) -> None:
    found = Law(mean, shape)
    count, probability = found._least()
    below, total = probability, count * probability
    while probability > 2.0**-100 or count < mean:
        probability *= found._ratio(count)
        count += 1
        below, total = below + probability, total + count * probability
    assert below == pytest.approx(1, abs=1e-10)
    assert total == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e-3])
@pytest.mark.parametrize("law", [Law(8.0, 1.0), Law(8.0, math.inf)], ids=lambda law: law.name)
def test_divergences_that_are_no_numbers_cost_no_epsilon_of_zero(law: Law, wrong: float) -> None:
    losses = trial_divergences(DIGITS).copy()
    for trial in (np.full(len(ORDERS), wrong), np.append(losses[:-1], wrong)):
        with pytest.raises(ValueError, match="not finite numbers"):
            search_cost(trial, law, 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        *({"trial": TRIAL | {"steps": steps}} for steps in (math.nan, 0, -1, 60.0, True, 10**30, None)),
        *({"trial": TRIAL | {"noise_multiplier": sigma}} for sigma in (math.nan, math.inf, 0.0, -1.0, 1e-300, "4")),
        *({"trial": TRIAL | {"sampling_probability": q}} for q in (math.nan, 0.0, -0.1, 1.5, None)),
        *({"expected_trials": mean} for mean in (math.nan, math.inf, 0.0, -1.0, "8", None, 10**30)),
        *({"shape": shape} for shape in (math.nan, -1.0, "1", 1e300, [1])),
        *({"orders": orders} for orders in ([], [math.nan], [math.inf], [2.5], ["2"], [10**30], None)),
        {"trial": TRIAL | {"more": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("law", [Law(8.0, 1.0), Law(8.0, math.inf)], ids=lambda law: law.name)
def test_a_statement_of_a_search_that_makes_no_sense_has_no_cost(law: Law, change: dict[str, Any]) -> None:
    released = Phase(**TRIAL)
    record = law.to_record() | {"trial": TRIAL, "orders": list(ORDERS)}
    honest = stated_cost(record, released=released, delta=1e-4)
    assert honest == search_cost(trial_divergences(released), law, 1e-4)
    with pytest.raises((ValueError, TypeError)):
        stated_cost(record | change, released=released, delta=1e-4)


def test_a_released_trial_of_which_nothing_can_be_said_is_within_no_bound() -> None:
    law = Law(8.0, 1.0)
    record = law.to_record() | {"trial": TRIAL, "orders": list(ORDERS)}
    with pytest.raises(ValueError, match="costs more than any trial may"):
        stated_cost(record, released=Phase(0.3, 3.9, 60), delta=1e-4)
    with pytest.raises(ValueError, match="make no sense"):
        stated_cost(record, released=Phase(0.3, math.nan, 60), delta=1e-4)
