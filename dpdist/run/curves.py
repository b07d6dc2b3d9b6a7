"""What can be drawn of a run over its steps, from its public files: every test metric, epsilon, throughput."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist.mechanism.composition import ADAPTIVE
from dpdist.run import metrics
from dpdist.run.calibration import stride_of
from dpdist.run.layout import RunPaths

Points = list[tuple[int, float]]

#: What an axis is called, with its unit, where the name alone does not tell.
_LABELS = {
    "accuracy": "test accuracy (fraction)",
    "token_accuracy": "test token accuracy (fraction)",
    "loss": "test loss (mean per example)",
    "perplexity": "test perplexity (per token)",
    "auroc": "test AUROC",
    "mse": "test MSE (squared units of the target)",
    "mae": "test MAE (units of the target)",
    "r2": "test R²",
}
EPSILON = "epsilon spent (upper bound)"
THROUGHPUT = "throughput (examples/s: B · steps / time)"


def label_of(metric: str) -> str:
    """What the axis of a test metric is called."""
    return _LABELS.get(metric, f"test {metric}")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """(step, value) of every finite value, in order of the steps."""

    #: By name of the metric, those that have a value.
    tested: dict[str, Points]
    epsilon: Points
    throughput: Points
    #: The epsilon that the run must not pass, or else that of its plan; None without privacy.
    target: float | None


def curves_of(root: Path) -> Curves:
    """The curves of a run, of what its files hold."""
    paths = RunPaths(root)
    records, plans = metrics.read(paths.metrics), _plans(paths.ledger)
    tested = [record for record in records if metrics.is_evaluation(record)]
    names = dict.fromkeys(name for record in tested for name in metrics.metrics_of(record))
    return Curves(
        tested={name: points for name in names if (points := _points(tested, name))},
        epsilon=_true_points(_points(records, "epsilon"), plans),
        throughput=_points(records, "examples_per_second"),
        target=None if not plans else plans[-1].get("target_epsilon") or plans[-1].get("epsilon"),
    )


def _points(records: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of every finite value, one a step."""
    found = {r["step"]: r[name] for r in records if isinstance(r.get(name), int | float) and math.isfinite(r[name])}
    return sorted(found.items())


def _plans(ledger: Path) -> list[dict[str, Any]]:
    """The plans of all incarnations, as the ledger has them."""
    try:
        records = [json.loads(line) for line in ledger.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [record for record in records if record.get("record") == "plan"]


def _true_points(points: Points, plans: list[dict[str, Any]]) -> Points:
    """Epsilon where it was computed, of a run that kept to one plan.

    In between, the records hold the value of the next such step, an upper bound: drawn at their own steps, the curve
    would have kinks.
    """
    if len(plans) != 1 or plans[0]["accountant"] == ADAPTIVE or not points:
        return points
    steps, last = plans[0]["steps"], points[-1][0]
    stride = stride_of(steps)
    computed = {min(steps, -(-step // stride) * stride): value for step, value in points}
    return [(step, value) for step, value in sorted(computed.items()) if step <= last]
