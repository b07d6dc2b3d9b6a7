"""Write a sweep's reports from its measured points: `scaling.csv`, `scaling.json`, `scaling.md` and the plots."""

from __future__ import annotations

import csv
import io
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.run.directory import write_atomically
from dpdist_launch.measure.scaling import markdown, plots
from dpdist_launch.measure.scaling.arms import ARMS, DP
from dpdist_launch.measure.scaling.directory import SweepDirectory
from dpdist_launch.measure.scaling.model import fraction_of_ideal, misfit, parallel_fraction

#: Largest misfit with which Amdahl's law still describes an arm.
DESCRIBED = 0.1

#: Quantities that are averaged over the repeats of one arm at one node count.
_AVERAGED = (
    "step_seconds",
    "compile_seconds",
    "padding",
    "imbalance",
    "microbatches_per_step",
    "all_reduce_seconds",
    "all_reduces_per_step",
    "all_reduce_share",
)


def write(directory: SweepDirectory) -> Path:
    """Write all reports into the sweep's directory; return the path of `scaling.md`.

    Raises:
        InputError: the private points differ in epsilon.
    """
    asked = directory.points()
    points = [measured for point in asked if (measured := directory.measured(point)) is not None]
    require_one_epsilon(points)
    order = list(ARMS)
    points.sort(key=lambda p: (p["nodes"], order.index(p["arm"]), p["repeat"]))
    described = directory.read()
    content = {
        "command": described["command"],
        "created": described["created"],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "measured": described["measured"],
        "missing": {
            point.name: directory.record(point).get("failed") for point in asked if directory.measured(point) is None
        },
        "base": base_of(points),
        "arms": aggregate(points),
        "points": points,
    }
    root = directory.root
    write_atomically(root / "scaling.csv", as_csv(points))
    write_atomically(root / "scaling.json", json.dumps(content, indent=2) + "\n")
    plots.write(root, content["arms"], unit_name(points))
    write_atomically(root / "scaling.md", markdown.text(content))
    return root / "scaling.md"


def require_one_epsilon(points: list[dict[str, Any]]) -> None:
    """Check that all private points state the same epsilon: it must not depend on the number of nodes.

    Raises:
        InputError: they do not; it names the points by epsilon.
    """
    found: dict[float, list[str]] = {}
    for point in points:
        if point["arm"] == DP:
            found.setdefault(point["epsilon"], []).append(f"{DP}-n{point['nodes']}-r{point['repeat']}")
    if len(found) > 1:
        named = "; ".join(f"{epsilon!r} at {', '.join(names)}" for epsilon, names in found.items())
        remedy = (
            "all points must have the same epsilon: remove the files that are not from this sweep and run it again."
        )
        raise InputError("epsilon", named, remedy)


def aggregate(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by arm, the fit of Amdahl's law and, by node count, statistics over the repeats.

    Throughput (examples per second) and fraction of ideal (relative to the arm's own at `base_of(points)`; None without
    a base) have `mean`, `min`, `max` and `std`, the sample standard deviation (0 for one repeat). `parallel_fraction`
    is None where the law does not describe the arm: where its `misfit` is above `DESCRIBED`.
    """
    base = base_of(points)
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        rates: dict[int, list[float]] = {}
        for point in points:
            if point["arm"] == arm:
                rates.setdefault(point["nodes"], []).append(point["examples_per_second"])
        if not rates:
            continue
        unit = statistics.mean(rates[base]) if base is not None else None
        nodes = {}
        for count in sorted(rates):
            same = [point for point in points if point["arm"] == arm and point["nodes"] == count]
            ideal = None
            if base is not None and unit is not None:
                ideal = [fraction_of_ideal(count, rate, base, unit) for rate in rates[count]]
            nodes[count] = {
                "devices": same[0]["devices"],
                "repeats": len(same),
                "physical_batch_size": sorted({point["physical_batch_size"] for point in same}),
                "examples_per_second": _spread(rates[count]),
                "fraction_of_ideal": _spread(ideal) if ideal is not None else None,
                **{name: statistics.mean(point[name] for point in same) for name in _AVERAGED},
            }
        fraction = parallel_fraction(rates)
        off = misfit(rates, fraction) if fraction is not None else None
        arms[arm] = {
            "smallest": min(rates),
            "parallel_fraction": fraction if off is not None and off <= DESCRIBED else None,
            "misfit": off,
            "nodes": nodes,
        }
    return arms


def base_of(points: list[dict[str, Any]]) -> int | None:
    """Return the smallest node count that every arm was measured at, or None where there is none."""
    counts: dict[str, set[int]] = {}
    for point in points:
        counts.setdefault(point["arm"], set()).add(point["nodes"])
    return min(set.intersection(*counts.values()), default=None) if counts else None


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def as_csv(points: list[dict[str, Any]]) -> str:
    """Return a CSV table with one row per point; nested values have dotted names."""
    rows = [_flat(point) for point in points]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def unit_name(points: list[dict[str, Any]]) -> str:
    """Return the axis label of node counts: `nodes (4 devices each)`."""
    per_node = sorted({point["devices"] // point["nodes"] for point in points})
    return f"nodes ({' or '.join(map(str, per_node))} device{'s' if per_node != [1] else ''} each)"
