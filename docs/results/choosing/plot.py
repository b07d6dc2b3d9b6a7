"""Draw results.json as docs/pictures/choosing.svg: `python docs/results/choosing/plot.py`."""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LABELS = {
    "rate": "learning rate · C",
    "clip": "clip norm C (learning rate 1 / C)",
    "batch": "expected batch size B",
    "steps": "steps T",
}

found = json.loads((HERE / "results.json").read_text())
with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpdist"}):
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (sweep, label) in zip(figure.subplots(2, 2).flat, LABELS.items(), strict=True):
        points = defaultdict(list)
        for each in found:
            if each["sweep"] == sweep:
                points[each["value"]].append(each["accuracy"])
        values = sorted(points)
        means = [sum(points[value]) / len(points[value]) for value in values]
        axes.plot(values, means, color="#1f6f8b", linewidth=1.8)
        for value in values:
            axes.plot([value] * len(points[value]), points[value], "o", color="#1f6f8b", markersize=3.5, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False, fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parents[1] / "pictures/choosing.svg", metadata={"Date": None})
