"""How training goes, for the owner of the data alone: loss, gradient norms and clipping of a run, read from `private/`.

None of it is covered by the guarantee. Nor is what is chosen after reading it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.run.layout import RunPaths

#: A share of the examples of a step that are clipped, beyond which C mostly sets their length, or under which seldom.
MOST, FEW = 0.95, 0.25
NOT_COVERED = (
    "Private: this shows the training data, and no guarantee covers it, nor a setting that is chosen because of it. "
    "Choose on public data, or count every run of a search (docs/threat-model.md)."
)


def diagnose(root: Path) -> dict[str, Any]:
    """`read` a run and plot it, under `private/diagnose`: `plots` are the paths of the pictures."""
    found = read(root)
    return found | {"plots": [str(path) for path in _plots(RunPaths(root), found)]}


def read(root: Path) -> dict[str, Any]:
    """What the private files of a run tell, as JSON.

    Returns:
        `clip_norm`, None in a plain run; `looks`: the records of `private/probe.jsonl`; `steps`: for each step taken
        its number, examples and the shares of them that were `clipped` and `not_finite`; `advice`: sentences.

    Raises:
        InputError: there is no run, or it has taken no step.
    """
    run = RunPaths(root)
    if not run.config.exists():
        raise InputError("RUN", str(root), "holds no run (no config.yaml).")
    config = config_module.from_dict(configfile.read(run.config))
    looks, steps = _lines(run.probe), [_shares(record) for record in _lines(run.diagnostics)]
    if not steps and (root / "privacy.json").exists():
        raise InputError("RUN", str(root), "is an export, which holds nothing private; name the run it was made of.")
    if not steps:
        raise InputError("RUN", str(root), "has taken no step yet.")
    bound = config.privacy.clip_norm if config.privacy.enabled else None
    return {"clip_norm": bound, "looks": looks, "steps": steps, "advice": advice(config, looks, steps)}


def advice(config: Config, looks: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    """What the numbers suggest, in sentences; empty where there is nothing to say."""
    said = []
    with_norms = [look for look in looks if look["norms"] is not None]
    if lost := sum(look["not_finite"] for look in looks):
        said.append(f"{lost} of {sum(look['examples'] for look in looks)} gradients that were tried are not finite.")
    if left_out := max((look.get("records_left_out", 0) for look in looks), default=0):
        share = "their units have more than data.records_per_unit"
        said.append(f"{left_out} training records are left out: {share} = {config.data.records_per_unit}.")
    if below := [look["below_clip_norm"] for look in looks if look.get("below_clip_norm") is not None]:
        said.append(
            f"A clipped example adds {below[-1]:.2%} less than C (median of a few), as clipping on tensor cores allows "
            "for rounding (training.precision=highest takes nothing, and more time)."
        )
    recent = steps[-max(1, len(steps) // 4) :]
    examples = max(1, sum(step["examples"] for step in recent))
    clipped = sum(step["clipped"] * step["examples"] for step in recent) / examples
    if config.privacy.enabled and with_norms and not FEW <= clipped <= MOST:
        median, bound = statistics.median(look["norms"]["p50"] for look in with_norms), config.privacy.clip_norm
        effect = (
            "nearly every gradient is cut to one length, which is common and often best, with a learning rate to match"
            if clipped > MOST
            else "the noise is scaled for longer gradients than there are"
        )
        said.append(
            f"{clipped:.0%} of the examples of the last {len(recent)} steps were clipped at C = {bound:g}, and the "
            f"median norm over the run is {median:.3g}: {effect}. A clip norm near the median ({_round(median)}) is a "
            "common start. Choosing it by these numbers is not covered by the guarantee."
        )
    return said


def as_text(found: dict[str, Any]) -> str:
    """A table of what was looked at, and the advice."""
    rows: list[tuple[str, ...]] = [("step", "training loss", "norm p10", "p50", "p90", "max", "not finite")]
    for look in found["looks"]:
        norms = look["norms"] or {}
        numbers = [look["loss"], *(norms.get(name) for name in ("p10", "p50", "p90", "max"))]
        shown = ["-" if value is None else f"{value:.4g}" for value in numbers]
        rows.append((str(look["step"]), *shown, f"{look['not_finite']} of {look['examples']}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([NOT_COVERED, "", *lines, "", *found["advice"], *(f"plot: {path}" for path in found["plots"])])


def _shares(record: dict[str, Any]) -> dict[str, Any]:
    examples = record["examples"]
    shares = {name: record[name] / max(1.0, examples) for name in ("clipped", "not_finite")}
    return {"step": record["step"] + 1, "examples": examples} | shares


def _lines(path: Path) -> list[dict[str, Any]]:
    """The newest record of each step; those that a newer incarnation has gone back behind are left out."""
    records: dict[int, dict[str, Any]] = {}
    newest = 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a crash has torn it
        if not isinstance(record, dict) or not {"incarnation", "step"} <= record.keys():
            continue
        if record["incarnation"] > newest:
            newest = record["incarnation"]
            records = {step: kept for step, kept in records.items() if step < record["step"]}
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _round(value: float) -> str:
    return f"{float(f'{value:.1g}'):g}"


def _plots(run: RunPaths, found: dict[str, Any]) -> list[Path]:
    from dpdist.run.plots import over_steps  # matplotlib takes a second

    to = run.private / "diagnose"
    to.mkdir(mode=0o700, exist_ok=True)
    looks = [look for look in found["looks"] if look["norms"] is not None]
    made = []

    def plot(name: str, label: str, paint: Callable[[Any], None]) -> None:
        figure, axes = over_steps(f"{run.root.name}: PRIVATE, covered by no guarantee", label)
        paint(axes)
        axes.set_xlim(left=0)
        path = to / f"{name}.png"
        figure.savefig(path)
        made.append(path)

    if looks:
        at = [look["step"] for look in looks]

        def loss(axes: Any) -> None:
            axes.plot(at, [look["loss"] for look in looks], color="#1f6f8b", marker="o", markersize=3.5)

        def norms(axes: Any) -> None:
            low, middle, high = ([look["norms"][name] for look in looks] for name in ("p10", "p50", "p90"))
            axes.fill_between(at, low, high, color="#1f6f8b", alpha=0.2, label="10% to 90%")
            axes.plot(at, middle, color="#1f6f8b", label="median")
            if found["clip_norm"] is not None:
                axes.axhline(found["clip_norm"], color="#c0392b", linestyle="--", label="clip norm C")
            axes.set_yscale("log")
            axes.legend(frameon=False)

        examples = looks[-1]["examples"]
        plot("loss", f"training loss (mean of {examples} examples)", loss)
        plot("norms", f"gradient norm ({examples} examples)", norms)

    def clipped(axes: Any) -> None:
        at = [step["step"] for step in found["steps"]]
        axes.plot(at, [step["clipped"] for step in found["steps"]], color="#1f6f8b", label="clipped")
        axes.plot(at, [step["not_finite"] for step in found["steps"]], color="#c0392b", label="not finite")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)

    plot("clipped", "share of a step's examples", clipped)
    return made
