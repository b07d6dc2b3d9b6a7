"""Pictures for the page, as SVG that takes its colours of text and lines from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

#: Of several runs, in order; readable on white and on dark grey, also for those who see no red or green.
COLOURS = ("#2a7fb8", "#d9822b", "#2b9e77", "#b5519c", "#8c7a3d", "#6f6fd1", "#c0504d", "#7f7f7f")
#: Stands for the page's colour of text until the picture is written; no other line has it.
_INK = "#010203"
_SIZE = (5.4, 3.1)


def over_steps(
    label: str,
    lines: Mapping[str, Points],
    *,
    from_zero: bool = False,
    logarithmic: bool = False,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Lines over the steps of runs, as an SVG element.

    Args:
        label: of the vertical axis, with its unit.
        lines: the points of each line by its name, which is shown where there are several; at most as many as
            `COLOURS` have colours of their own.
        from_zero: the vertical axis begins at 0.
        logarithmic: the vertical axis is; takes positive values only.
        levels: horizontal lines to compare with, by name.
    """
    # Names of runs may hold dollars; text stays text, which can be searched and takes the page's font.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "dpdist"}):
        return _svg(_figure(label, lines, from_zero, logarithmic, levels or {}), label)


def _figure(
    label: str, lines: Mapping[str, Points], from_zero: bool, logarithmic: bool, levels: Mapping[str, float]
) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    longest = 1
    for place, (name, points) in enumerate(lines.items()):
        steps, values = zip(*points, strict=True)
        longest = max(longest, *steps)
        marker = "o" if len(points) <= 30 else None
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(steps, values, label=name, color=colour, linewidth=1.8, marker=marker, markersize=3.5)
    for name, value in levels.items():
        axes.axhline(value, color=_INK, linewidth=1, linestyle="--", label=name)
    axes.set_xlim(0, longest * 1.02)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
    elif from_zero:
        axes.set_ylim(bottom=0)
    if max(abs(value) for points in lines.values() for _, value in points) >= 1000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.18, color=_INK)
    if len(lines) > 1 or levels:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    axes.tick_params(colors=_INK, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    return figure


def _svg(figure: Figure, label: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_escaped(label)}" ', 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
