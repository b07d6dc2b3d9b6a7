"""An accountant that shares nothing with dp-accounting, exact to a few parts in 1e4 at any delta, to compare with.

Epsilon of T Poisson-subsampled Gaussian steps by their privacy loss distribution, rounded upward throughout.

With P = (1 - q) N(0, sigma^2) + q N(1, sigma^2) and Q = N(0, sigma^2), a step loses L(x) = log(1 - q + q e^r), r = (x -
1/2) / sigma^2, where x is drawn from P; in the other direction it is drawn from Q and loses -L. Neither is the worse
one in every composition (Lebeda et al. 2024, arXiv 2405.20769), so both are computed. Four moves:

1. Grid. Losses lie on multiples of h. The mass of a cell goes to its two ends such that its mass under P and that under
   Q both stay ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which dominates the true pair whatever h
   is. So h may bound the time: `CELLS` for one step, 16 times as many points for all. Above the grid, loss is infinite.
2. Tilt. Masses are multiplied by exp(theta L - K(theta)), K their cumulant generating function, with the theta at which
   Chernoff's bound on epsilon, (T K(theta) + log(1 / delta)) / theta, is least: what was the tail becomes the bulk.
3. Fourier transform, to the power T.
4. delta(epsilon) = sum over l > epsilon of (1 - exp(epsilon - l)) mass(l), solved for epsilon.

Round-off is bounded and charged. Cells: that of the normal distribution function, its argument's included, counts as
mass at the upper end. Losses at the edges: far below 2^-26 h a step. Transforms: log2(n) `_ROUNDINGS` in the 2-norm
(Higham 2002, Theorem 24.2), T-fold by the power, summed over points by Cauchy and Schwarz; relative to the bulk, while
without the tilt it would be T 2^-53 beside a small delta. Sums and exponents: `_OF_SUMS` of their number and size, and
2^-31 of sums over points. Mass that wraps around the window only adds, but for what lies above it: at most `_TAIL`
delta, by Chernoff's bound.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, optimize, signal, special

#: Cells of the loss of one step; fewer are faster, and state a little more.
CELLS = 2**16
_TAIL, _ROUNDINGS, _OF_SUMS, _OF_EDGES = 2.0**-20, 2.0**-49, 2.0**-44, 2.0**-26


def tilted_epsilon(q: float, sigma: float, steps: int, delta: float, cells: int = CELLS) -> float:
    """Bound the epsilon of `steps` >= 1 steps at `delta` from above; infinite where round-off may reach delta.

    The work is bounded: at most two grids, of `cells` cells, and a transform of some 16 times as many points for each.
    """
    if delta < 1e-290:  # too near to the smallest float
        return math.inf
    reach = -special.ndtri_exp(math.log(_TAIL) + math.log(delta) - math.log(steps))
    low, high = (_loss(q, (side * reach * sigma + side / 2) / sigma**2) for side in (-1, 1))
    h = (high - low) / cells
    for _ in range(2):
        first = math.floor(low / h)
        edges = h * np.arange(first - 1, max(math.ceil(high / h), first + 2) + 2)
        p, r = _cells(q, sigma, edges)
        pairs = (p, r, edges), (r[::-1], p[::-1], -edges[::-1])
        found = [_compose(*_round_up(*pair), pair[2][1:-1], steps, delta, 16 * cells) for pair in pairs]
        h = max(width for _, width in found) / (8 * cells)
        if max(epsilon for epsilon, _ in found) < math.inf:
            break
    return max(epsilon for epsilon, _ in found)


def _loss(q: float, ratio: float) -> float:
    """log(1 - q + q exp(ratio)), precise also where it is near 0."""
    if abs(ratio) < 1:
        return math.log1p(q * math.expm1(ratio))
    return float(np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + ratio))


def _cells(q: float, sigma: float, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The masses of P and of Q between edges of the loss; the outermost cells reach to infinity."""
    with np.errstate(all="ignore"):
        near = np.log1p(np.maximum(-1, np.expm1(np.minimum(edges, 1)) / q))
        far = edges + np.log1p(np.maximum(-1, (q - 1) * np.exp(np.minimum(-edges, 700)))) - math.log(q)
        x = np.where(np.abs(edges) < 1, near, far) * sigma**2 + 0.5
    x[0], x[-1] = -np.inf, np.inf
    both = x / sigma, (x - 1) / sigma
    zero, one = (np.where(z[1:] > 0, -np.diff(special.ndtr(-z)), np.diff(special.ndtr(z))).clip(0) for z in both)
    return (1 - q) * zero + q * one, zero


def _round_up(p: np.ndarray, r: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, float]:
    """Masses at the inner edges, and of an infinite loss, where x is drawn with masses `p` and compared to `r`."""
    mass, other, h = p[1:-1], r[1:-1], edges[2] - edges[1]
    with np.errstate(all="ignore"):
        ratio = np.exp(edges[1:-2])
        upper = (mass - ratio * other + _ROUNDINGS * (1 + ratio)) / -np.expm1(-h)
    upper = np.where(np.isfinite(upper) & (other > 1e-290), np.clip(upper, 0, mass), mass)
    points = np.append(mass - upper, 0.0)
    points[1:] += upper
    points[0] += p[0]
    return points, p[-1]


def _compose(
    mass: np.ndarray, infinite: float, losses: np.ndarray, steps: int, delta: float, most: int
) -> tuple[float, float]:
    """Epsilon in one direction, infinite where the window of losses has more than `most` points, and its width."""
    h, goal = losses[1] - losses[0], -math.log(delta)
    with np.errstate(divide="ignore"):
        logs = np.log(mass)

    def cumulant(s: float) -> float:
        return float(special.logsumexp(logs + s * losses))

    def bound(s: float, goal: float, tilt: float = 0.0, at_tilt: float = 0.0) -> float:
        return (steps * (cumulant(tilt + s) - at_tilt) + goal) / s

    # No smaller theta can be the best: the slopes of K are within the losses.
    ends = math.log(goal / (2 * steps * np.abs(losses).max())), math.log(10 / h)
    theta = math.exp(optimize.minimize_scalar(lambda t: bound(math.exp(t), goal), bounds=ends, method="bounded").x)
    chernoff, at_theta = bound(theta, goal), cumulant(theta)
    tilted = np.exp(logs + theta * losses - at_theta)
    mean = np.average(losses, weights=tilted)
    deviation = math.sqrt(steps * np.average((losses - mean) ** 2, weights=tilted)) + h
    tilts = 2 ** np.arange(-3.0, 3.0) * math.sqrt(-math.log(_TAIL)) / deviation
    top = max(chernoff, min(bound(s, -math.log(_TAIL), theta, at_theta) for s in tilts))
    bottom = max(bound(-s, -math.log(_TAIL), theta, at_theta) for s in tilts)
    if top - bottom > most * h:
        return math.inf, top - bottom
    n = fft.next_fast_len(max(len(mass), math.ceil((top - bottom) / h) + 2), real=True)
    lowest = math.floor(bottom / h)
    composed = fft.irfft(fft.rfft(tilted, n) ** float(steps), n)
    composed = np.roll(np.maximum(0, composed), (steps * round(losses[0] / h) - lowest) % n)[::-1]
    totals = h * np.arange(lowest + n - 1.0, lowest - 1.0, -1)
    # From here on masses are in units of delta, and added up from the highest loss downward.
    weights = np.exp(np.minimum(300, theta * (chernoff - totals)))
    off = _ROUNDINGS * math.log2(n) * (steps + 2) * np.linalg.norm(tilted) * np.sqrt(np.cumsum(weights**2))
    off += _TAIL + steps * infinite / delta + _OF_SUMS * (steps * (1 + abs(at_theta)) + goal)
    above = np.cumsum(composed * weights) * (1 + 2.0**-31)
    divided = signal.lfilter([1], [1, -math.exp(-h)], composed * weights)
    passed = np.flatnonzero(above - divided + off > 1)
    k = passed[0] if len(passed) else n - 1
    if k == 0:
        return math.inf, top - bottom
    epsilon = totals[k - 1]
    if len(passed) and divided[k - 1] > 0:
        epsilon += min(0.0, math.log((above[k - 1] + off[k] - 1) / divided[k - 1]))
    return max(0.0, epsilon) + steps * h * _OF_EDGES, top - bottom
