"""An attack on one delta for two statements: who has seen a lucky start leaves the plan, who has not stays in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from exact_epsilon import cost, gaussian_epsilon
from scipy import stats

from dpdist.mechanism.composition import Phase, adaptive_epsilon
from dpdist.run.calibration import best_order


def excess(sigma: float, further: float, staying: float, leaving: float) -> float:
    """P(S) - integral over S of e^epsilon Q at its greatest: the delta that the two stated numbers have together.

    The plan is one step without sampling, whose loss is N(1 / (2 sigma^2), 1 / sigma^2). On seeing it one either ends,
    and is told the epsilon `staying`, or takes another step with noise `further`, and is told `leaving`.
    """
    mean, deviation = 0.5 / sigma**2, 1 / sigma
    loss = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 400_001)
    stay = np.maximum(0, -np.expm1(np.minimum(0, staying - loss)))
    beyond = loss + 0.5 / further**2 - leaving
    shifted = np.exp(0.5 / further**2 - beyond + stats.norm.logcdf((beyond - 1 / further**2) * further))
    leave = stats.norm.cdf(beyond * further) - shifted
    return float(np.trapezoid(stats.norm.pdf(loss, mean, deviation) * np.maximum(stay, leave), loss))


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
