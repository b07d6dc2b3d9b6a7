"""The joint epsilon of runs, exports and sweeps over the same records, as JSON and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.joint.members import Member, apart, read
from dpdist.joint.together import SUM, added, fixed_cost, joint_cost
from dpdist.mechanism.accounting import Spent
from dpdist.mechanism.composition import ADAPTIVE

_HOW = {
    "pld": "by privacy loss distributions: all plans were fixed before any result was seen",
    "rdp": "by Renyi differential privacy: all plans were fixed before any result was seen",
    ADAPTIVE: "by a Renyi filter, which holds also where later runs were planned on seeing results of earlier ones",
    SUM: "by adding epsilons and deltas, which holds also where later runs were planned on seeing results; "
    "note that delta is larger than that of each run",
}
ON_YOUR_WORD = (
    "that these runs were trained on the same records is taken on your word; where they were not, the joint epsilon "
    "holds for a record that is in several, and is more than needed for one that is in a single one"
)


def compose(
    paths: Sequence[Path], *, at_once: bool = False, delta: float | None = None, same_data: str | None = None
) -> dict[str, Any]:
    """What all runs below `paths` cost together, as JSON.

    Args:
        paths: run directories, exports and sweeps.
        at_once: the user says that all plans were fixed before any result of one was seen.
        delta: of the joint guarantee; None is the smallest of the runs'.
        same_data: what was found of their data; None where it was not looked at.

    Raises:
        InputError: one cannot be read or has no guarantee, or they do not promise to the same unit.
    """
    if delta is not None and not 0 < delta < 1:
        raise InputError("--delta", delta, "give a number between 0 and 1.")
    members, notes, recorded = read(paths)
    _require_one_unit(members)
    _require_one_split(members)
    fixed = (at_once or recorded) and apart(members) and not any("has not begun" in note for note in notes)
    kept = all(member.charges.kept_to_plan for member in members)
    if at_once and not fixed:
        notes.append("--at-once is not used: not all plans that were asked for have begun, or a copy went on apart")
    elif fixed and not kept and len(members) > 1:
        used = "--at-once is not used" if at_once else "the sweep's record is not used"
        notes.append(f"{used}: a run has gone beyond its first plan")
    fixed = fixed and kept
    if len(members) > 1 and any(member.kind == "search" for member in members):
        if delta is not None:
            remedy = "leave it out: a search is composed by adding epsilons and deltas."
            raise InputError("--delta", delta, remedy)
        spent, fixed = added([member.stated for member in members]), False
    elif len(members) == 1 and delta not in (None, members[0].stated.delta):
        spent = _at(members[0], delta)
    else:
        spent = joint_cost(
            [member.charges for member in members],
            [member.stated for member in members],
            delta=min(member.stated.delta for member in members) if delta is None else delta,
            orders=orders_of(members),
            at_once=fixed,
        )
    return {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "accountant": spent.accountant,
        "at_once": fixed,
        "at_once_by": None if not fixed else "your word" if at_once else "the sweep's record",
        "unit": members[0].unit,
        "largest_epsilon": max(member.stated.epsilon for member in members),
        "sum": {
            "epsilon": sum(member.stated.epsilon for member in members),
            "delta": sum(member.stated.delta for member in members),
        },
        "same_data": ON_YOUR_WORD if same_data is None else same_data,
        "runs": [_of(member) for member in members],
        "notes": notes,
        "on_trust": [item for member in members for item in member.on_trust] + _trusted(members),
    }


def _at(member: Member, delta: float) -> Spent:
    """What a single run costs at another delta than its own.

    Raises:
        InputError: it is stated at its own delta alone.
    """
    if member.kind == "search" or not member.charges.kept_to_plan:
        remedy = (
            f"leave it out: {member.path} has left its plan, or is a search, and its epsilon holds at its own delta, "
            f"{member.stated.delta:g}, alone."
        )
        raise InputError("--delta", delta, remedy)
    return fixed_cost([member.charges.first], delta)


def _of(member: Member) -> dict[str, Any]:
    return {
        "path": str(member.path),
        "kind": member.kind,
        "epsilon": member.stated.epsilon,
        "delta": member.stated.delta,
        "steps": sum(phase.steps for phase in member.charges.phases),
        "noise_multiplier": member.charges.phases[-1].noise_multiplier,
        "sampling_probability": member.charges.phases[-1].sampling_probability,
        "dataset_size": member.dataset_size,
    }


def orders_of(members: Sequence[Member]) -> list[int]:
    """The order of the run that began first; all of them where that cannot be told."""
    times = [member.born for member in members]
    if len(members) > 1 and None in times:
        return sorted({member.charges.order for member in members})
    return [min(members, key=lambda member: member.born or 0.0).charges.order]


def _require_one_unit(members: Sequence[Member]) -> None:
    first = members[0]
    for member in members:
        if member.unit != first.unit:
            remedy = (
                f"its guarantee is for {member.unit}, that of {first.path} for {first.unit}; no joint epsilon covers "
                "both: a guarantee for a record says little to somebody with many. Compose those of one unit."
            )
            raise InputError("RUN", str(member.path), remedy)


def _require_one_split(members: Sequence[Member]) -> None:
    """Raises where one run may test on what another trained on: test accuracy is published exactly."""
    known = [member for member in members if member.split]
    for member in known:
        for name, value in member.split.items():
            if value != known[0].split[name]:
                remedy = (
                    f"{name} is {value!r}, and {known[0].split[name]!r} in {known[0].path}: records that one of them "
                    "trains on are tested on by the other, which publishes its accuracy on them exactly. No epsilon "
                    "covers that."
                )
                raise InputError("RUN", str(member.path), remedy)


def _trusted(members: Sequence[Member]) -> list[str]:
    told = ["the ledgers and statements are whole, and no other run was trained on these records"]
    if len(members) > 1:
        told.append("no run was tested on records that another was trained on")
    return told


def as_text(found: dict[str, Any]) -> str:
    """The table, the joint epsilon, and what it rests on."""
    rows = [("run", "kind", "steps", "sigma", "q", "N", "epsilon", "delta")]
    for run in found["runs"]:
        numbers = (run["noise_multiplier"], run["sampling_probability"])
        shown = [f"{number:.4g}" for number in numbers]
        ends = (str(run["dataset_size"]), rounded_up(run["epsilon"]), f"{run['delta']:g}")
        rows.append((run["path"], run["kind"], str(run["steps"]), *shown, *ends))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    several = len(found["runs"]) > 1
    how = f", {_HOW[found['accountant']]}" if several else ""
    if several and found["at_once"]:
        how += f" ({found['at_once_by']})"
    lines += [
        "",
        f"joint epsilon: {rounded_up(found['epsilon'])} at delta {found['delta']:g}, for {found['unit']}{how}",
    ]
    if several and found["accountant"] != SUM:
        total = found["sum"]
        lines.append(f"  added up, they would be {rounded_up(total['epsilon'])} at delta {total['delta']:g}")
    if several:
        lines.append(f"same data: {found['same_data']}")
    lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join([*lines, *(f"on trust: {item}" for item in found["on_trust"])])


def rounded_up(value: float) -> str:
    """An epsilon to four digits, never below it."""
    if not math.isfinite(value):
        return str(value)
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(value)):.4g}"
