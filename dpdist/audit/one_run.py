"""The audit with one run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846): many canaries, each in by a coin.

Each of m canaries is in the training data or a null record, by a fair coin of its own. From what the run releases, the
auditor guesses r of the coins and abstains from the others. Under (epsilon, delta)-DP the number of right guesses is,
whatever the auditor does, hardly larger than that of r coins which fall right with probability e^eps / (1 + e^eps):

    P(right >= v) <= P(X >= v) + 2 m delta max_{1 <= i <= v} P(v - i <= X < v) / i,   X ~ Binomial(r, 1 / (1 + e^-eps)),

Theorem 5.2 and Corollary 5.4 there. Every epsilon for which this is below 1 - confidence is refuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from scipy import optimize, stats

#: Shares of the canaries that are guessed; the best of them counts, and pays for the choice.
GUESSED = (1 / 64, 1 / 16, 1 / 4, 1.0)
_LARGEST = 60.0


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """A lower bound on epsilon from one run, and the guesses behind it."""

    epsilon_lower: float
    confidence: float
    canaries: int
    guesses: int
    right: int


def p_value(canaries: int, guesses: int, right: int, *, epsilon: float, delta: float) -> float:
    """Bound the probability of so many right guesses, or more, in a run that is (epsilon, delta)-DP.

    Args:
        canaries: m.
        guesses: r, at most m.
        right: v, at most r.

    Raises:
        ValueError: not 0 <= right <= guesses <= canaries.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses on {canaries} canaries is impossible")
    coin = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    below = np.cumsum(coin.pmf(np.arange(right - 1, -1, -1)))  # P(v - i <= X < v) for i = 1, 2, ..., v
    most = float(np.max(below / np.arange(1, right + 1))) if right else 0.0
    return min(1.0, float(coin.sf(right - 1)) + 2 * canaries * delta * most)


def refuted(canaries: int, guesses: int, right: int, *, delta: float, confidence: float) -> float:
    """The largest epsilon that so many right guesses refute; 0 where they refute none."""
    wrong = 1 - confidence

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, right, epsilon=epsilon, delta=delta) - wrong

    if excess(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, _LARGEST, xtol=1e-6)) - 1e-6 if excess(_LARGEST) > 0 else _LARGEST


def epsilon_lower(
    scores: Sequence[Float64[np.ndarray, " m"]], included: Bool[np.ndarray, " m"], *, delta: float, confidence: float
) -> Guesses:
    """Bound epsilon from below by the canaries' scores in one run.

    Args:
        scores: one array for each way to score: around 0 where nothing speaks for either, above it for "included".
        included: the coins, fair and independent of each other and of all else.
    """
    m = len(included)
    tries = [(score, max(1, round(share * m))) for score in scores for share in GUESSED]
    each = 1 - (1 - confidence) / len(tries)
    found = []
    for score, guesses in tries:
        surest = np.argsort(-np.abs(score), kind="stable")[:guesses]
        right = int(np.sum((score[surest] > 0) == included[surest]))
        epsilon = refuted(m, guesses, right, delta=delta, confidence=each)
        found.append(Guesses(epsilon_lower=epsilon, confidence=confidence, canaries=m, guesses=guesses, right=right))
    return max(found, key=lambda each: each.epsilon_lower)
