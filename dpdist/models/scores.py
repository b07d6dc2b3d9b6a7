"""Metrics of many examples that are no mean over them: exact, from all outputs at once, on the host in float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Shaped


def auroc(scores: Shaped[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Return the area under the ROC curve: how often a positive example scores higher than a negative; a tie is half.

    It is the Mann-Whitney statistic over the number of pairs (Fawcett 2006, section 7); NaN where there are no pairs,
    or a score is NaN.
    """
    positives, pairs = int(positive.sum()), int(positive.sum()) * int((~positive).sum())
    if pairs == 0 or np.isnan(scores).any():
        return float("nan")
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # equal scores share the mean of their ranks
    return float((ranks[which][positive].sum() - positives * (positives + 1) / 2) / pairs)


def r2(predicted: Shaped[np.ndarray, "n k"], target: Shaped[np.ndarray, "n k"]) -> float:
    """Return the coefficient of determination, the mean over k outputs; NaN where a target is the same everywhere."""
    residual = np.square(target - predicted).sum(axis=0)
    total = np.square(target - target.mean(axis=0)).sum(axis=0)
    return float(np.mean(1 - residual / total)) if (total > 0).all() else float("nan")
