"""Write `scaling.md`: the tables of a sweep, and the conditions of the measurement."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from dpdist_launch.measure.scaling.arms import DP, SGD


def text(content: dict[str, Any]) -> str:
    """Return the page for the content of `scaling.json`."""
    arms: dict[str, Any] = content["arms"]
    points: list[dict[str, Any]] = content["points"]
    counts = sorted({count for arm in arms.values() for count in arm["nodes"]})
    parts = [
        "# Scaling over node counts",
        _conditions(content),
        _notes(content),
        "## Throughput, examples per second",
        "Mean over repeats, with the sample standard deviation where there are several. Strong scaling: the expected "
        f"batch of {points[0]['expected_batch_size']:g} examples is the same at every node count.",
        _throughput(arms, counts),
        "## Fraction of ideal",
        *_fraction_of_ideal(arms, counts, content["base"]),
        "## Where it goes",
        "Step: the median. All-reduce share: the step's vector reduced by a program of its own, times the "
        "reductions in a step, over the step. Padding: computed slots without an example. Imbalance: most examples on "
        "a device over the mean. Compile: building the programs, not part of any step.",
        _anatomy(arms, counts),
        "![throughput](throughput.png)\n\n![fraction of ideal](fraction_of_ideal.png)\n\n![Amdahl's law](amdahl.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _conditions(content: dict[str, Any]) -> str:
    points = content["points"]
    hardware, versions = [p["hardware"] for p in points], [p["versions"] for p in points]
    starts = [p["started"] for p in points]
    private = {p["epsilon"] for p in points if p["arm"] == DP}
    privacy = f"epsilon {private.pop():.4g} at every node count" if private else "no private arm"
    measured = content["measured"]
    delta = f" (delta {measured['privacy.delta']:g})" if measured["privacy.delta"] and privacy[0] == "e" else ""
    lines = {
        "command": f"`{shlex.join(content['command'])}`",
        "measured": f"{min(starts)} to {max(starts)}, {points[0]['steps']} steps a point",
        "hardware": f"{_distinct(h['device_kind'] for h in hardware)} ({_distinct(h['machine'] for h in hardware)}), "
        f"hosts: {_distinct(h['hosts'] for h in hardware)}, "
        f"cores a host: {_distinct(h['cores_per_host'] for h in hardware)}",
        "versions": ", ".join(f"{name} {_distinct(v[name] for v in versions)}" for name in versions[0]),
        "model": f"{measured['model.name']}, {points[0]['parameters']:,} parameters, data {measured['data.source']}",
        "privacy": privacy + delta,
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in lines.items())


def _notes(content: dict[str, Any]) -> str:
    notes = []
    crowded = [p for p in content["points"] if shares_cores(p)]
    if crowded:
        worst = max(crowded, key=lambda p: p["nodes"])
        hardware = worst["hardware"]
        notes.append(
            f"Up to {worst['nodes']} nodes were {worst['processes']} processes on {hardware['hosts']} host(s) of "
            f"{hardware['cores_per_host']} cores, which they shared: these curves show overhead, not speed."
        )
    for count in sorted({p["nodes"] for p in content["points"]}):
        sizes = {p["physical_batch_size"] for p in content["points"] if p["nodes"] == count}
        if len(sizes) > 1:
            notes.append(f"At {count} nodes the physical batches differ ({_distinct(sizes)}): no fair comparison.")
    if content["missing"]:
        named = [f"{name} ({why})" if why else name for name, why in content["missing"].items()]
        notes.append(f"Not measured (yet): {', '.join(named)}.")
    return "\n".join(f"> **Note.** {note}\n>" for note in notes).removesuffix("\n>")


def shares_cores(point: dict[str, Any]) -> bool:
    """Return whether processes shared cores: several nodes on one host, or more processes than cores on a host."""
    hardware = point["hardware"]
    return point["nodes"] > hardware["hosts"] or hardware["processes_per_host"] > hardware["cores_per_host"]


def _throughput(arms: dict[str, Any], counts: list[int]) -> str:
    compared = DP in arms and SGD in arms
    rows = []
    for count in counts:
        row = [str(count), _devices(arms, count)]
        row += [_with_spread(arm["nodes"].get(count), "examples_per_second", ",.0f") for arm in arms.values()]
        if compared:
            both = [arms[name]["nodes"].get(count) for name in (DP, SGD)]
            rates = [found["examples_per_second"]["mean"] for found in both if found]
            row.append(f"{rates[0] / rates[1]:.3f}" if len(rates) == 2 else "")
        rows.append(row)
    return _table(["nodes", "devices", *arms, *(["dp / sgd"] if compared else [])], rows)


def _fraction_of_ideal(arms: dict[str, Any], counts: list[int], base: int | None) -> list[str]:
    if base is None:
        said = ["At no node count was every arm measured: there is no base that all of them could be compared to."]
        rows = []
    else:
        said = [
            f"Throughput over that of the arm at {_nodes(base)}, the base, divided by the ratio of the node counts."
        ]
        if base > counts[0]:
            said.append(f"(At {_nodes(counts[0])}, not every arm was measured.)")
        rows = [
            [str(count), *(_with_spread(arm["nodes"].get(count), "fraction_of_ideal", ".3f") for arm in arms.values())]
            for count in counts
        ]
    fitted = [arm["parallel_fraction"] for arm in arms.values()]
    rows.append(["Amdahl's f", *("" if f is None else f"{f:.4f}" for f in fitted)])
    off = ["" if arm["misfit"] is None else f"{arm['misfit']:.1%}" for arm in arms.values()]
    rows.append(["off by (root mean square)", *off])
    for name, arm in arms.items():
        if arm["misfit"] is not None and arm["parallel_fraction"] is None:
            said.append(
                f"Amdahl's law does not describe {name}: its best fit is off by {arm['misfit']:.0%}, so it has no f."
            )
    if any(len(arm["nodes"]) == 2 for arm in arms.values()):
        said.append(
            "Through two node counts the law always goes, where more nodes are not slower than fewer: being off by "
            "nothing there says nothing."
        )
    return [" ".join(said), _table(["nodes", *arms], rows)]


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _anatomy(arms: dict[str, Any], counts: list[int]) -> str:
    rows = []
    for count in counts:
        for name, arm in arms.items():
            if (found := arm["nodes"].get(count)) is None:
                continue
            rows.append(
                [
                    str(count),
                    name,
                    f"{1000 * found['step_seconds']:,.1f}",
                    ", ".join(map(str, found["physical_batch_size"])),
                    f"{found['microbatches_per_step']:.3g}",
                    f"{found['all_reduces_per_step']:.3g}",
                    f"{1000 * found['all_reduce_seconds']:.3g}",
                    f"{found['all_reduce_share']:.1%}",
                    f"{found['padding']:.1%}",
                    f"{found['imbalance']:.3f}",
                    f"{found['compile_seconds']:.1f}",
                ]
            )
    head = "nodes,arm,step ms,physical batch,microbatches,all-reduces,all-reduce ms,all-reduce share,padding,imbalance"
    return _table([*head.split(","), "compile s"], rows)


def _devices(arms: dict[str, Any], count: int) -> str:
    return _distinct(arm["nodes"][count]["devices"] for arm in arms.values() if count in arm["nodes"])


def _with_spread(found: dict[str, Any] | None, name: str, style: str) -> str:
    if found is None:
        return ""
    spread = found[name]
    return f"{spread['mean']:{style}}" + (f" ± {spread['std']:{style}}" if found["repeats"] > 1 else "")
