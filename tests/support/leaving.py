"""The strongest use of a choice made on results: one more step where the first was lucky, and only there."""

from __future__ import annotations

import numpy as np
from scipy import stats


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
