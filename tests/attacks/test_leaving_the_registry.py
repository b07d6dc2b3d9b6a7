"""An attack on a registry's one delta: a second run is added only where the first was lucky, with what pays best."""

from __future__ import annotations

import pytest
from leaving import excess

from dpdist.joint.together import Charges, wall_cost
from dpdist.mechanism.composition import Phase
from dpdist.run.calibration import best_order


def one_step(sigma: float, delta: float) -> Charges:
    plan = Phase(1.0, sigma, 1)
    return Charges(first=plan, phases=(plan,), delta=delta, order=best_order(plan, delta))


@pytest.mark.parametrize("delta", [1e-3, 1e-5])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 0.5), (0.9, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize(("sigma", "further"), [(0.5, 0.6), (1.0, 1.3), (2.0, 8.0), (5.0, 3.0), (5.0, 0.3)])
def test_who_adds_a_run_only_when_lucky_gains_no_delta(
    sigma: float, further: float, shares: tuple[float, float], delta: float
) -> None:
    first, second = one_step(sigma, shares[0] * delta), one_step(further, shares[1] * delta)
    for order in (3, 10, 40):
        staying = wall_cost([first], order=order, delta=delta)
        leaving = wall_cost([first, second], order=order, delta=delta)
        assert excess(sigma, further, staying, leaving) <= delta


def test_without_shares_of_delta_this_attack_would_gain() -> None:
    """The plain sum of two runs at the whole delta each, read at that delta: what the shares are there for."""
    delta, sigma, further = 1e-3, 5.0, 0.3
    alone = [one_step(each, delta).alone().epsilon for each in (sigma, further)]
    assert excess(sigma, further, alone[0], sum(alone)) > 1.5 * delta
