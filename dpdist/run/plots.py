"""Plots of a run, from its public files alone: every test metric, epsilon and throughput over the steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpdist.run.curves import EPSILON, THROUGHPUT, Points, curves_of, label_of
from dpdist.run.layout import RunPaths


def plot_run(root: Path) -> list[Path]:
    """Write `plots/NAME.png` of every test metric, `epsilon.png` and `throughput.png`, those that have data."""
    paths, drawn = RunPaths(root), curves_of(root)
    paths.plots.mkdir(exist_ok=True)
    made = []
    for name, points in drawn.tested.items():
        file = re.sub(r"[^\w.-]", "_", name)
        made.append(_plot(paths, file, points, label_of(name), from_zero=False))
    made.append(_plot(paths, "epsilon", drawn.epsilon, EPSILON, target=drawn.target))
    made.append(_plot(paths, "throughput", drawn.throughput, THROUGHPUT))
    return [path for path in made if path is not None]


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
