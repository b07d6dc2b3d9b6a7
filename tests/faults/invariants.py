"""What must hold of a run, whatever has happened to it. Each check returns what is violated, in words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from jobs import Run

#: Equal on any topology, and equal on the same one.
SAME_ANYWHERE = ("status", "step", "steps", "epsilon", "delta", "noise_multiplier", "incarnation")
SAME_HERE = (*SAME_ANYWHERE, "accuracy", "params_sha256")


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file whose last line may be torn.

    Raises:
        ValueError: another line is.
    """
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def charges(run: Run) -> Counter[tuple[int, int]]:
    """How often the ledger charges each (incarnation, step)."""
    blocks = [record for record in whole_lines(run.root / "ledger.jsonl") if record["record"] == "steps"]
    return Counter((b.get("incarnation", 0), step) for b in blocks for step in range(b["start"], b["stop"]))


def committed(run: Run) -> list[int]:
    """Steps of the checkpoints under their final names."""
    directory = run.root / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def of_any(run: Run, steps: int, before: bytes = b"") -> list[str]:
    """What is violated in a run that may have ended anywhere.

    Args:
        steps: planned.
        before: what the ledger held at an earlier time.
    """
    ledger = run.root / "ledger.jsonl"
    now = ledger.read_bytes() if ledger.exists() else b""
    whole = before[: before.rfind(b"\n") + 1]
    found = [] if now.startswith(whole) else ["the ledger lost or changed what it held before"]
    try:
        charged = charges(run)
    except (ValueError, KeyError) as error:
        return [*found, f"the ledger cannot be read ({error})"]
    if twice := sorted(key for key, times in charged.items() if times > 1):
        found.append(f"steps {twice} are charged twice")
    charged_steps = {step for _, step in charged}
    if unplanned := sorted(charged_steps - set(range(steps))):
        found.append(f"steps {unplanned} are charged and not planned")
    newest = max(committed(run), default=0)
    if uncharged := sorted(set(range(newest)) - charged_steps):
        found.append(f"step {newest} is committed, but steps {uncharged} are not charged")
    taken = {record["step"] for record in whole_lines(run.root / "private/diagnostics.jsonl")}
    if uncharged := sorted(taken - charged_steps):
        found.append(f"steps {uncharged} were taken and are not charged")
    shown = [record["step"] for record in whole_lines(run.root / "metrics.jsonl") if "accuracy" in record]
    if early := [step for step in shown if step > newest]:
        found.append(f"the accuracy of steps {early} is shown, but the newest checkpoint is {newest}")
    return found


def of_finished(run: Run, reference: Run, *, same_topology: bool) -> list[str]:
    """How a run that has finished differs from one that nobody disturbed."""
    summary, expected = run.summary, reference.summary
    steps = expected["steps"]
    found = of_any(run, steps)
    for name in SAME_HERE if same_topology else SAME_ANYWHERE:
        if summary[name] != expected[name]:
            found.append(f"{name} is {summary[name]!r}, undisturbed {expected[name]!r}")
    if charges(run) != charges(reference):
        found.append(f"the ledger charges {sorted(charges(run))}, not each of {steps} steps once")
    digests, others = digests_of(run), digests_of(reference)
    for step in range(steps):
        if digests.get(step) != others[step]:
            found.append(f"step {step} sampled or drew {digests.get(step)}, undisturbed {others[step]}")
    if same_topology:
        for step, accuracies in accuracies_of(run).items():
            if accuracies != accuracies_of(reference).get(step):
                found.append(f"accuracy of step {step} was shown as {accuracies}")
    return found


def of_begun_anew(run: Run, reference: Run) -> list[str]:
    """What is violated in a run that lost checkpoints and went on as a new incarnation: all is charged, none reused."""
    summary, expected = run.summary, reference.summary
    found = of_any(run, expected["steps"])
    if summary["status"] != "finished":
        found.append(f"status is {summary['status']!r}")
    if not summary["epsilon"] > expected["epsilon"]:
        found.append(f"epsilon is {summary['epsilon']}, no more than that of one incarnation")
    drawn: dict[str, tuple[int, int]] = {}
    for record in whole_lines(run.root / "private/diagnostics.jsonl"):
        step = record["incarnation"], record["step"]
        if drawn.setdefault(record["noise_sha256"], step) != step:
            found.append(f"(incarnation, step) {step} drew the noise of {drawn[record['noise_sha256']]}")
    return found


def digests_of(run: Run) -> dict[int, set[tuple[str, str]]]:
    """What each step sampled and drew, in all its replays: in a good run one pair each."""
    found: dict[int, set[tuple[str, str]]] = {}
    for record in whole_lines(run.root / "private/diagnostics.jsonl"):
        found.setdefault(record["step"], set()).add((record["sample_sha256"], record["noise_sha256"]))
    return found


def accuracies_of(run: Run) -> dict[int, set[float]]:
    """What was shown as the accuracy of each step."""
    found: dict[int, set[float]] = {}
    for record in whole_lines(run.root / "metrics.jsonl"):
        if "accuracy" in record:
            found.setdefault(record["step"], set()).add(record["accuracy"])
    return found


def replayed(run: Run) -> int:
    """How many steps were taken more than once."""
    steps = [record["step"] for record in whole_lines(run.root / "private/diagnostics.jsonl")]
    return len(steps) - len(set(steps))
