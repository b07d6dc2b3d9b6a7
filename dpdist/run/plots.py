"""Plots of a run, from its public metrics alone: accuracy, epsilon and throughput over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpdist.run import metrics


def plot_run(root: Path) -> list[Path]:
    """Write `plots/accuracy.png`, `epsilon.png` and `throughput.png`, those that have data; returns their paths."""
    records = metrics.read(root / "metrics.jsonl")
    plots = root / "plots"
    plots.mkdir(exist_ok=True)
    made = []
    for name, key, label in (
        ("accuracy", "accuracy", "test accuracy"),
        ("epsilon", "epsilon", "epsilon spent (upper bound)"),
        ("throughput", "examples_per_second", "examples per second (B * steps / time)"),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            made.append(_plot(plots / f"{name}.png", points, label, from_zero=name != "accuracy"))
    return made


def _plot(path: Path, points: Sequence[tuple[int, float]], label: str, *, from_zero: bool) -> Path:
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state: a run may end on a compute node
    axes = figure.add_subplot()
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color="#1f6f8b", linewidth=1.8, marker="o" if len(points) <= 30 else None, markersize=3.5)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.annotate(f"{values[-1]:,.4g}", (steps[-1], values[-1]), textcoords="offset points", xytext=(-4, 7), ha="right")
    figure.savefig(path)
    return path
