"""Plot a sweep: throughput, fraction of ideal, and Amdahl's law over node counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dpdist_launch.measure.scaling.arms import DP, SGD, SGD_SYNC
from dpdist_launch.measure.scaling.model import speed_up

#: Colour and marker by arm: three of Okabe and Ito's colours, distinguishable with every kind of colour vision.
_STYLE = {DP: ("#0072B2", "o"), SGD: ("#E69F00", "s"), SGD_SYNC: ("#009E73", "^")}


def write(root: Path, arms: dict[str, Any], nodes_label: str) -> None:
    """Write `throughput.png`, `fraction_of_ideal.png` and `amdahl.png` for `arms`, the result of `report.aggregate`."""
    counts = sorted({count for arm in arms.values() for count in arm["nodes"]})
    for name, draw in (("throughput", _throughput), ("fraction_of_ideal", _fraction_of_ideal), ("amdahl", _amdahl)):
        _figure(root / f"{name}.png", arms, counts, nodes_label, draw)


def _figure(
    path: Path, arms: dict[str, Any], counts: list[int], label: str, draw: Callable[[Axes, dict[str, Any]], None]
) -> None:
    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state: this may run on a compute node
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    draw(axes, arms)
    # Only measured counts are ticks; powers of two or ten in between were not measured.
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(*_legend(axes), frameon=False)
    figure.savefig(path)


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Return handles and labels with the arms first; matplotlib lists curves with error bars last."""
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1].startswith(("ideal", "fit"))
    )
    return [handle for handle, _ in entries], [label for _, label in entries]


def _plain_ticks(axes: Axes) -> None:
    """Label a logarithmic y axis with plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _curve(axes: Axes, arm: str, nodes: dict[int, Any], quantity: str, *, label: str, scale: float = 1.0) -> None:
    """Draw the means, with bars from the smallest to the largest repeat."""
    colour, marker = _STYLE[arm]
    spreads = [found[quantity] for found in nodes.values()]
    means = scale * np.array([spread["mean"] for spread in spreads])
    low, high = (scale * np.array([spread[end] for spread in spreads]) for end in ("min", "max"))
    axes.errorbar(
        list(nodes),
        means,
        yerr=[means - low, high - means],
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.8,
        capsize=4 if (high > low).any() else 0,
        label=label,
    )


def _throughput(axes: Axes, arms: dict[str, Any]) -> None:
    for name, arm in arms.items():
        _curve(axes, name, arm["nodes"], "examples_per_second", label=name)
        unit = arm["nodes"][arm["smallest"]]["examples_per_second"]["mean"] / arm["smallest"]
        ends = [arm["smallest"], max(arm["nodes"])]
        axes.plot(ends, [unit * end for end in ends], color=_STYLE[name][0], linewidth=1, linestyle=":")
    axes.plot([], [], color="grey", linewidth=1, linestyle=":", label="ideal, from the smallest count")
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_ylabel("examples per second (B * steps / time)")


def _fraction_of_ideal(axes: Axes, arms: dict[str, Any]) -> None:
    for name, arm in arms.items():
        if all(found["fraction_of_ideal"] is not None for found in arm["nodes"].values()):
            _curve(axes, name, arm["nodes"], "fraction_of_ideal", label=name)
    axes.axhline(1, color="grey", linewidth=1, linestyle=":", label="ideal")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of ideal throughput")


def _amdahl(axes: Axes, arms: dict[str, Any]) -> None:
    for name, arm in arms.items():
        smallest, nodes, fraction = arm["smallest"], arm["nodes"], arm["parallel_fraction"]
        fitted = "no fit" if fraction is None else f"f = {fraction:.4f}"
        unit = nodes[smallest]["examples_per_second"]["mean"]
        colour, marker = _STYLE[name]
        means = [found["examples_per_second"]["mean"] / unit for found in nodes.values()]
        axes.plot(
            list(nodes), means, color=colour, marker=marker, markersize=7, linestyle="none", label=f"{name}: {fitted}"
        )
        if fraction is not None:
            at = np.geomspace(smallest, max(nodes), 100)
            axes.plot(at, [speed_up(n, smallest, fraction) for n in at], color=colour, linewidth=1.6)
    if any(arm["parallel_fraction"] is not None for arm in arms.values()):
        axes.plot([], [], color="grey", linewidth=1.6, label="fit: 1 / ((1 - f) + f n0 / n)")
    ends = [min(arm["smallest"] for arm in arms.values()), max(max(arm["nodes"]) for arm in arms.values())]
    axes.plot(ends, [end / ends[0] for end in ends], color="grey", linewidth=1, linestyle=":", label="ideal")
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_ylabel("speed-up over the smallest node count")
