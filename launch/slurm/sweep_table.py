"""Where the points of a sweep stand, what each has cost, and what choosing among them costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpdist.config import Config
from dpdist.joint.together import cost_together
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.run.directory import RunDirectory
from dpdist.run.metrics import is_evaluation, metrics_of
from dpdist.run.summary import guarantee, is_trial
from dpdist_launch.slurm.sweep import Point, Sweep


def standing(sweep: Sweep) -> dict[str, Any]:
    """The sweep as JSON: `points`, the composed cost of all that were ever asked for, and what it covers."""
    return {"run_dir": str(sweep.root), "points": [_of_point(point) for point in sweep.points]} | _together(sweep)


def _of_point(point: Point) -> dict[str, Any]:
    job, summary = point.job(), point.ended()
    last = _last_metrics(RunDirectory(point.run_dir).metrics)
    standing = "not submitted" if job is None else str(job.status())
    found = summary or last
    return {
        "point": point.name,
        "settings": point.settings,
        "state": summary["status"] if summary is not None else standing,
        "ended": summary is not None,
        "job": None if job is None else job.id,
        "step": found.get("step", 0),
        "epsilon": found.get("epsilon"),
        "accuracy": found.get("accuracy"),
        "metrics": found.get("metrics", {}),
        "run_dir": str(point.run_dir),
        "log": None if job is None else str(job.log()),
    }


def _last_metrics(file: Path) -> dict[str, Any]:
    """The last step and epsilon, and the last test metrics; a line that is being written is left out."""
    last: dict[str, Any] = {}
    text = file.read_text() if file.exists() else ""
    for record in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
        last |= record | ({"metrics": metrics_of(record)} if is_evaluation(record) else {})
    return last


def _together(sweep: Sweep) -> dict[str, Any]:
    asked = sweep.asked()
    names = [point["name"] for points in asked for point in points]
    ledgers, without = [], [point.name for point in sweep.points if not _holds(point.config)]
    if gone := [name for name in names if not (sweep.root / name).is_dir()]:
        return {"composed": None, "composed_says": f"no composed epsilon: what {', '.join(gone)} has cost is gone"}
    for name in names:
        summary = RunDirectory(sweep.root / name).read_summary() or {}
        if not str(summary.get("guarantee", "holds")).startswith("holds"):
            without.append(name)
            continue
        try:
            ledger = Ledger(RunDirectory(sweep.root / name).ledger)
        except (LedgerError, OSError):
            without.append(name)
            continue
        if ledger.plan is None:
            continue  # it has not begun
        if (
            ledger.copied
            or is_trial(ledger.plans)
            or any(plan.privacy is None or plan.insecure for plan in ledger.plans)
        ):
            without.append(name)
        else:
            ledgers.append(ledger)
    if without or not ledgers:
        why = f"no guarantee holds for {', '.join(dict.fromkeys(without))}" if without else "no point has begun"
        return {"composed": None, "composed_says": f"no composed epsilon: {why}"}
    if ledgers[0].path.parent.name != names[0]:  # the bound's order is that of this point, fixed before any result
        return {"composed": None, "composed_says": f"no composed epsilon before {names[0]} has begun"}
    # How many have begun may depend on what was seen: as long as some have not, only a bound that allows for it holds.
    # Nor was a point asked for that began with other settings than the record has.
    digests = {point["name"]: point["digest"] for points in asked for point in points}
    as_asked = all(ledger.plans[0].settings == digests[ledger.path.parent.name] for ledger in ledgers)
    fixed = len(asked) == 1 and len(ledgers) == len(names) and as_asked
    cost = cost_together(ledgers, at_once=fixed)
    text = (
        f"choosing the best of the sweep costs the composed epsilon, {cost.epsilon:.4g} at delta {cost.delta:g}, and "
        f"not that of the point that is chosen; it covers the whole plans of the {len(ledgers)} of {len(names)} points "
        f"that have begun{'' if len(asked) == 1 else ', some of which were added later'}"
    )
    composed = {"epsilon": cost.epsilon, "delta": cost.delta, "accountant": cost.accountant, "points": len(ledgers)}
    return {"composed": composed, "composed_says": text}


def _holds(config: Config) -> bool:
    return guarantee(config, finite=True).startswith("holds")


def as_text(found: dict[str, Any]) -> str:
    """The table, and under it the composed epsilon."""
    told = [name for point in found["points"] for name in list(point["metrics"])[:1]]
    metric = told[0] if told else "accuracy"
    rows = [("point", "state", "step", "epsilon", metric)]
    for point in found["points"]:
        values = (point["epsilon"], point["metrics"].get(metric, point.get(metric)))
        numbers = (f"{value:.4g}" if value is not None else "-" for value in values)
        rows.append((point["point"], point["state"], str(point["step"]), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, found["composed_says"]])
