"""What a plan costs: epsilon of a number of steps.

The mechanism is the T-fold composition of the Poisson-subsampled Gaussian under zero-out adjacency (one record replaced
by a null record; `REPLACE_SPECIAL` in dp-accounting), which has the same epsilon as add/remove. Two accountants of
dp-accounting bound epsilon from above: privacy loss distributions (PLD) with pessimistic rounding (Koskela et al. 2020;
Doroshenko et al. 2022) and Renyi DP (RDP; Mironov et al. 2019). The smaller bound is stated, nearly always PLD's.

PLD composes by Fourier transforms, whose round-off is no matter of its pessimism: at small delta it stated up to 2.8%
less than the exact value. Against the closed form at q = 1, delta is off by at most 0.25 T 2^-53; 16 T 2^-53 is taken
off delta here, and where that would be a tenth of it, PLD is not asked. The interval of its grid grows with epsilon, so
that the work is bounded whatever the arguments are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from scipy import optimize

from dpdist.mechanism.sampling import inclusion_probability

ADJACENCY = "zero-out: one training record replaced by a null record"
#: What `epsilon` answers for; beyond, there is no privacy, or nothing left to learn.
SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER, MOST_STEPS = 1e-3, 1e6, 10**12
#: Share of delta that pays for whatever is done beyond the first plan, if anything (`mechanism/composition.py`).
KEPT = 0.01
#: Intervals of PLD's grid that hold the losses of all steps, more or less.
INTERVALS = 2**18
# Integer orders have a closed form at every q; the series for fractional orders may fail to converge.
ORDERS = [*range(2, 65), *range(68, 129, 4), 160, 192, 256, 512, 1024, 2048]
_FINEST, _ROUND_OFF = 1e-4, 16 * 2.0**-53


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon at `delta`, and which accountant gave it (`pld` or `rdp`)."""

    epsilon: float
    delta: float
    epsilon_rdp: float
    accountant: str


def epsilon(
    *, sampling_probability: float, noise_multiplier: float, steps: int, delta: float, intervals: int = INTERVALS
) -> Spent:
    """Bound the epsilon of `steps` steps at `delta` from above, with the right to change the plan later.

    It takes about a second at most, whatever the arguments are.

    Args:
        sampling_probability: q in (0, 1]; rounded to the probability that `sampling` draws with.
        noise_multiplier: sigma, the noise's standard deviation divided by the clipping norm.
        steps: T >= 0; zero steps cost nothing.
        delta: in (0, 1).
        intervals: fewer are faster, and state a little more.

    Raises:
        ValueError: an argument out of range.
    """
    if not SMALLEST_NOISE_MULTIPLIER <= noise_multiplier <= LARGEST_NOISE_MULTIPLIER:
        bounds = f"{SMALLEST_NOISE_MULTIPLIER:g} to {LARGEST_NOISE_MULTIPLIER:g}"
        raise ValueError(f"the noise multiplier must be positive, from {bounds}, not {noise_multiplier!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), not {delta!r}")
    if not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"the number of steps must be 0 or more, up to {MOST_STEPS:g}, not {steps!r}")
    q, fixed = inclusion_probability(sampling_probability), (1 - KEPT) * delta
    if steps == 0:
        return Spent(0.0, delta, 0.0, "pld")
    losses = divergences(q, noise_multiplier, steps, ORDERS)
    rdp, widest = (float(compute_epsilon(ORDERS, losses, tail)[0]) for tail in (fixed, 1e-15))
    # A single step's distribution reaches as far as ten standard deviations do, however rarely.
    reach = 10 / noise_multiplier + 0.5 / noise_multiplier**2
    interval = max(_FINEST, widest / intervals, reach / (2 * intervals))
    pld = _pld_epsilon(q, noise_multiplier, steps, fixed, interval, rdp)
    return Spent(min(pld, rdp), delta, rdp, "pld" if pld <= rdp else "rdp")


def _pld_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float, most: float) -> float:
    """By privacy loss distributions on a grid of `interval`; infinite above `most`, or where round-off is too large."""
    off = steps * _ROUND_OFF
    if off > delta / 10:
        return math.inf
    try:
        one = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
    except OverflowError:  # losses beyond the largest float
        return math.inf
    losses = one.self_compose(steps)

    def excess(epsilon: float) -> float:
        return float(losses.get_delta_for_epsilon(epsilon)) - (delta - off)

    # The library's own inverse overflows where epsilon is over 700.
    if excess(most) > 0:
        return math.inf
    return float(optimize.brentq(excess, 0.0, most, rtol=1e-9)) * (1 + 4e-9) if excess(0.0) > 0 else 0.0


def divergences(sampling_probability: float, noise_multiplier: float, steps: int, orders: Sequence[int]) -> np.ndarray:
    """Renyi divergence of all steps at each order, the larger of both directions, with 2^-46 a step for round-off."""
    step = PoissonSampledDpEvent(inclusion_probability(sampling_probability), GaussianDpEvent(noise_multiplier))
    one = RdpAccountant(orders, NeighboringRelation.REPLACE_SPECIAL).compose(step).rdp
    return steps * (one * (1 + 2.0**-40) + 2.0**-46)
