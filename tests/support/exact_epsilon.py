"""What accounting is compared with: the exact epsilon of the Gaussian mechanism; and `epsilon`, each computed once."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import optimize, stats

from dpdist.mechanism.accounting import Spent, epsilon


@cache
def cost(q: float, sigma: float, steps: int, delta: float) -> Spent:
    return epsilon(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Compute the exact epsilon of one Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""

    def excess(eps: float) -> float:
        tail = np.exp(eps + stats.norm.logcdf(-0.5 / sigma - eps * sigma))
        return float(stats.norm.cdf(0.5 / sigma - eps * sigma) - tail - delta)

    return float(optimize.brentq(excess, 0, 200, xtol=1e-12))
