"""From scores of runs with and without the canary to a lower bound on epsilon, at a stated confidence.

For every event E of what a run shows, (epsilon, delta)-DP says P(E | D) <= e^epsilon P(E | D') + delta, for neighbours
D and D' in either order. So epsilon >= log((P(E | D) - delta) / P(E | D')), with exact (Clopper-Pearson) limits for
both probabilities (Jagielski et al. 2020, arXiv 2006.07709). The event is `score >= t` or `score <= t`; which, and t,
is chosen on runs that are then set aside, so that the confidence needs no correction for the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import stats

#: Share of the runs that choose the event.
CHOOSING = 1 / 3
_THRESHOLDS = 100


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound on epsilon from runs with and without the canary, and what it was found on."""

    epsilon_lower: float
    #: The probability, over all runs, that `epsilon_lower` is no more than the true epsilon.
    confidence: float
    #: The event, such as `score >= 1.2`, and the dataset in which it is the likelier: `with` or `without` the canary.
    event: str
    likelier: str
    #: How often it happened: [likelier, other] dataset, of `runs` each.
    happened: tuple[int, int]
    runs: tuple[int, int]


@dataclass(frozen=True)
class _Event:
    above: bool
    threshold: float
    with_canary: bool

    def __str__(self) -> str:
        return f"score {'>=' if self.above else '<='} {self.threshold:.4g}"

    def count(self, scores: Float64[np.ndarray, " n"]) -> int:
        return int(_times(scores, np.array([self.threshold]), above=self.above)[0])


def clopper_pearson(successes: Any, trials: int, confidence: float) -> tuple[Any, Any]:
    """Limits of a binomial probability: each, on its own, holds with `confidence` (Clopper and Pearson 1934).

    Args:
        successes: a number, or an array of numbers.
    """
    wrong, failures = 1 - confidence, trials - np.asarray(successes)
    with np.errstate(invalid="ignore"):
        low = np.where(successes > 0, stats.beta.ppf(wrong, np.maximum(successes, 1), failures + 1), 0.0)
        high = np.where(failures > 0, stats.beta.isf(wrong, successes + 1, np.maximum(failures, 1)), 1.0)
    return low, high


def epsilon_of_counts(likelier: tuple[Any, int], other: tuple[Any, int], *, delta: float, confidence: float) -> Any:
    """Lower bound on epsilon where an event happened (times, of runs) in the likelier dataset and in the other one.

    Args:
        likelier: a number of times or an array of them, and the runs; `other` likewise.
    """
    each = 1 - (1 - confidence) / 2  # two limits, each of which may fail
    low, high = clopper_pearson(*likelier, each)[0], clopper_pearson(*other, each)[1]
    return np.log(np.maximum((low - delta) / high, 1.0))


def epsilon_lower(
    present: Float64[np.ndarray, " n"], absent: Float64[np.ndarray, " m"], *, delta: float, confidence: float
) -> Bound:
    """Bound epsilon from below by the scores of independent runs with the canary (`present`) and without (`absent`).

    The order of the runs must not depend on their scores: the first third chooses the event.

    Raises:
        ValueError: there are fewer than 6 runs of either, or a score is NaN.
    """
    if min(len(present), len(absent)) < 6:
        raise ValueError(f"{len(present)} and {len(absent)} runs are too few; give at least 6 of each")
    if np.isnan(present).any() or np.isnan(absent).any():
        raise ValueError("a score is NaN")
    cuts = round(CHOOSING * len(present)), round(CHOOSING * len(absent))
    event = _choose(present[: cuts[0]], absent[: cuts[1]], delta, confidence)
    present, absent = present[cuts[0] :], absent[cuts[1] :]
    likelier, other = (present, absent) if event.with_canary else (absent, present)
    happened, runs = (event.count(likelier), event.count(other)), (len(likelier), len(other))
    return Bound(
        epsilon_lower=float(
            epsilon_of_counts((happened[0], runs[0]), (happened[1], runs[1]), delta=delta, confidence=confidence)
        ),
        confidence=confidence,
        event=str(event),
        likelier="with" if event.with_canary else "without",
        happened=happened,
        runs=runs,
    )


def _choose(
    present: Float64[np.ndarray, " n"], absent: Float64[np.ndarray, " m"], delta: float, confidence: float
) -> _Event:
    """The event with the largest bound on these runs, as if they were the ones that count."""
    both = np.concatenate([present, absent])
    thresholds = np.unique(np.quantile(both, np.linspace(0, 1, _THRESHOLDS), method="nearest"))
    best, found = -1.0, _Event(True, float(np.median(both)), True)
    for above in (True, False):
        times = [_times(scores, thresholds, above=above) for scores in (present, absent)]
        counts = (times[0], len(present)), (times[1], len(absent))
        for with_canary in (True, False):
            likelier, other = counts if with_canary else counts[::-1]
            epsilon = epsilon_of_counts(likelier, other, delta=delta, confidence=confidence)
            if epsilon.max() > best:
                best, found = epsilon.max(), _Event(above, float(thresholds[epsilon.argmax()]), with_canary)
    return found


def _times(scores: Float64[np.ndarray, " n"], thresholds: Float64[np.ndarray, " k"], *, above: bool) -> Any:
    """How many scores are at or above (or at or below) each threshold: int[k]."""
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, thresholds, side="left" if above else "right")
    return len(scores) - below if above else below
