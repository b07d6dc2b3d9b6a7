"""Plots of a run, from its public files alone: every test metric, epsilon and throughput over the steps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def plot_run(root: Path) -> list[Path]:
    """Write `plots/NAME.png` of every test metric, `epsilon.png` and `throughput.png`, those that have data."""
    paths = RunPaths(root)
    records, plans = metrics.read(paths.metrics), _plans(paths.ledger)
    paths.plots.mkdir(exist_ok=True)
    tested = [record for record in records if metrics.is_evaluation(record)]
    made = []
    for name in dict.fromkeys(name for record in tested for name in metrics.metrics_of(record)):
        file = re.sub(r"[^\w.-]", "_", name)
        points = _points(tested, name)
        made.append(_plot(paths, file, points, _LABELS.get(name, f"test {name}"), from_zero=False))
    target = None if not plans else plans[-1].get("target_epsilon") or plans[-1].get("epsilon")
    spent = _true_points(_points(records, "epsilon"), plans)
    made.append(_plot(paths, "epsilon", spent, "epsilon spent (upper bound)", target=target))
    rates = _points(records, "examples_per_second")
    made.append(_plot(paths, "throughput", rates, "throughput (examples/s: B · steps / time)"))
    return [path for path in made if path is not None]


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


def over_steps(title: str, label: str) -> tuple[Figure, Any]:
    """An empty figure over the steps of a run, and its axes."""
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state: a run may end on a compute node
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plot(
    paths: RunPaths, name: str, points: Points, label: str, *, from_zero: bool = True, target: float | None = None
) -> Path | None:
    if not points:
        return None
    figure, axes = over_steps(f"{paths.root.resolve().name}: {label.partition(' (')[0]}", label)
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color="#1f6f8b", linewidth=1.8, marker="o" if len(points) <= 30 else None, markersize=3.5)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(0, 1.1 * max(*values, target or 0))
    if target is not None:
        axes.axhline(target, color="#b04a3a", linewidth=1.2, linestyle="--")
        axes.text(
            0.01, target, f"target {target:,.4g}", color="#b04a3a", va="bottom", transform=axes.get_yaxis_transform()
        )
    # Below the last point where a target line is close above it.
    below = target is not None and values[-1] > 0.85 * target
    place, side = ((0, -20), "top") if below else ((-4, 7), "bottom")
    last = (steps[-1], values[-1])
    axes.annotate(_number(values[-1]), last, textcoords="offset points", xytext=place, ha="right", va=side)
    if max(map(abs, values)) >= 1000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    path = paths.plots / f"{name}.png"
    figure.savefig(path)
    return path
