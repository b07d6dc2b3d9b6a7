"""An attack on one delta for two statements: who has seen a lucky start leaves the plan, who has not stays in it."""

from __future__ import annotations

import math

import pytest
from exact_epsilon import cost, gaussian_epsilon
from leaving import excess

from dpdist.mechanism.composition import Phase, adaptive_epsilon
from dpdist.run.calibration import best_order


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("sigma", "further"), [(0.3, 0.325), (0.5, 0.587), (1.0, 1.29), (2.0, 2.33), (5.0, 7.57)])
def test_who_leaves_the_plan_only_when_lucky_gains_no_delta(sigma: float, further: float, delta: float) -> None:
    """With both numbers stated at delta alone, as they once were, this strategy had up to 1.016 delta."""
    plan, phases = Phase(1.0, sigma, 1), [Phase(1.0, sigma, 1), Phase(1.0, further, 1)]
    order = best_order(plan, delta)
    leaving = adaptive_epsilon(phases, order=order, delta=delta)
    assert excess(sigma, further, cost(1.0, sigma, 1, delta).epsilon, leaving) <= delta
    divergence = order * (0.5 / sigma**2 + 0.5 / further**2)
    former = divergence + math.log(1 / delta) / (order - 1)
    assert excess(sigma, further, gaussian_epsilon(sigma, delta), former) > delta
