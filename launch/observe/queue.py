"""What SLURM says of jobs, in one question for all of them, and within a bound: a login node must answer without it.

The controller forgets a job minutes after its end. Of a run that never began nothing else says what became of it, so
the accounting is asked too, where there is one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from dataclasses import dataclass

#: Seconds that SLURM is given.
PATIENCE = 3.0
_SEPARATOR = "|"


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job that SLURM still knows."""

    #: SLURM's word, such as PENDING.
    state: str
    #: Why it is not running, such as Priority; None where there is nothing to say.
    reason: str | None
    #: When it began or, while it waits, is expected to: local time, `2026-11-27T08:30:00`; None if SLURM does not say.
    start: str | None
    #: SLURM's list of nodes, such as `n[01-20]`; may be empty.
    nodes: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The jobs that SLURM knows, by number, and why it gave no answer where it gave none."""

    jobs: dict[str, QueuedJob]
    failure: str | None = None


def ask(jobs: Collection[str], *, past: Collection[str] = (), patience: float = PATIENCE) -> Answer:
    """Ask SLURM about jobs, by number. What it does not know is not in the answer.

    Args:
        past: those of them to look up in the accounting where the controller has forgotten them.
    """
    if not jobs:
        return Answer(jobs={})
    form = _SEPARATOR.join(("%i", "%T", "%r", "%S", "%N"))
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(sorted(jobs))}", f"--format={form}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except FileNotFoundError:
        return Answer(jobs={}, failure="there is no squeue here")
    except subprocess.TimeoutExpired:
        return Answer(jobs={}, failure=f"SLURM gave no answer within {patience:g} s")
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:  # said where it has forgotten the only one
        said = asked.stderr.strip().partition("\n")[0]
        return Answer(jobs={}, failure=said or f"squeue returned {asked.returncode}")
    found = parsed(asked.stdout)
    return Answer(jobs=found | _recorded(set(past) - found.keys(), patience))


def _recorded(jobs: Collection[str], patience: float) -> dict[str, QueuedJob]:
    """What the accounting says of jobs; nothing where there is none."""
    if not jobs:
        return {}
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(sorted(jobs))}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.split(_SEPARATOR) for line in asked.stdout.splitlines()]
    # `CANCELLED by 1000` says who did it; an array has lines of other numbers.
    states = {pair[0]: pair[1].split()[0] for pair in pairs if len(pair) == 2 and pair[1].strip() and pair[0] in jobs}
    return {job: QueuedJob(state=state, reason=None, start=None, nodes="") for job, state in states.items()}


def parsed(text: str) -> dict[str, QueuedJob]:
    """The jobs in what squeue prints, by number."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(_SEPARATOR)]
        if len(cells) != 5:
            continue
        number, state, reason, start, nodes = cells
        found[number] = QueuedJob(
            state=state,
            reason=None if reason in ("None", "") else reason.strip("()"),
            start=None if start in ("N/A", "") else start,
            nodes=nodes,
        )
    return found
