"""Delta over epsilon as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpdist.errors import InputError
from dpdist.joint.compose import rounded_up

if TYPE_CHECKING:
    from dpdist.joint.views import Curve

#: How far below delta a curve is drawn.
_BELOW = 1e-4
_COLORS = ("#1f6f8b", "#b04a3a")


def plot_curves(path: Path, curves: Mapping[str, Curve], epsilon: float, delta: float) -> Path:
    """Draw the curves, by whom they are for, and mark (epsilon, delta) on the first.

    Raises:
        InputError: the file cannot be written, or its name is that of no picture.
    """
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, found), color in zip(curves.items(), _COLORS, strict=False):
        axes.semilogy(found.epsilons, found.deltas, color=color, linewidth=1.8, label=f"for {name}")
    label = f"epsilon {rounded_up(epsilon)} at delta {delta:g}"
    axes.plot([epsilon], [delta], "o", color=_COLORS[0], markersize=5, label=label)
    least = delta * _BELOW
    ends = [min(float(found.epsilons[-1]), found.epsilon(least)) for found in curves.values()]
    axes.set_xlim(0, max(*ends, epsilon))
    axes.set_ylim(least, 1)
    axes.set_xlabel("epsilon")
    axes.set_ylabel("delta (upper bound)")
    axes.set_title("What the guarantee says at every epsilon", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError("--plot", str(path), f"cannot be written: {error}; name a file such as curve.png.") from None
    return path
