"""What SLURM says of the jobs of runs, and of those whose run has no directory yet: one question each, within a bound.

A login node must answer without SLURM, too.

The controller forgets a job minutes after its end. Of a run that never began nothing else says what became of it, so
the accounting is asked too, where there is one.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

#: Seconds that SLURM is given.
PATIENCE = 3.0
#: The failure where SLURM is not installed.
NO_SLURM = "there is no squeue here"
_SEPARATOR = "|"
#: What stands between fields of which some are free text: users write no control characters into names.
_UNIT = "\x1f"
#: States of a job that may not have made its directory yet.
_COMING = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED")
#: Our batch scripts, and what the jobs of a copy of them are called.
_SCRIPTS, _NAME = ("train_80gpu.sh", "scaling.sh"), "dpdist"


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
class ComingJob:
    """A job of mine that sbatch has sent and whose run has no directory yet: its ranks make it once they have met."""

    number: str
    #: As in `QueuedJob`.
    state: str
    reason: str | None
    start: str | None
    #: The batch script and its arguments, or the job's name where SLURM keeps no command.
    command: str
    #: The run directory, where the command names it.
    run_dir: str | None


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
    selected = ("--states=all", f"--jobs={','.join(sorted(jobs))}")
    said, failure = _squeue(selected, ("%i", "%T", "%r", "%S", "%N"), patience)
    if failure is not None and "Invalid job id" not in failure:  # said where it has forgotten the only one
        return Answer(jobs={}, failure=failure)
    found = parsed(said)
    return Answer(jobs=found | _recorded(set(past) - found.keys(), patience))


def coming(known: Collection[str], *, patience: float = PATIENCE) -> tuple[list[ComingJob], str | None]:
    """My jobs of our batch scripts that wait or begin, without those in `known`, and why SLURM did not say."""
    fields = ("%i", "%T", "%r", "%S", "%j", "%Z", "%o")
    said, failure = _squeue(("--me", f"--states={','.join(_COMING)}"), fields, patience, separator=_UNIT)
    numbers, found = {_whole(job) for job in known}, []
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(_UNIT)]
        if len(cells) != len(fields) or _whole(cells[0]) in numbers:
            continue
        number, state, reason, start, name, directory, command = cells
        script, _, arguments = command.partition(" ")
        if Path(script).name in _SCRIPTS or name.startswith(_NAME):
            words = name if command in ("", "(null)") else f"{Path(script).name} {arguments}".strip()
            run_dir = _run_dir(directory, arguments)
            when = _when(reason, start)
            found.append(ComingJob(number=number, state=state, command=words, run_dir=run_dir, **when))
    return sorted(found, key=lambda job: [len(job.number), job.number]), failure


def _whole(number: str) -> str:
    """The number of the job that a task of an array, or a part of a heterogeneous job, belongs to."""
    return re.split(r"[_+]", number)[0]


def _run_dir(directory: str, arguments: str) -> str | None:
    """The last `--run-dir` among arguments, from the job's working directory."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # SLURM keeps no quotes, so that one may be open
        return None
    named = [word.partition("=")[2] for word in words if word.startswith("--run-dir=")]
    named += [after for word, after in pairwise(words) if word == "--run-dir"]
    return str(Path(directory) / named[-1]) if named else None


def _squeue(
    selected: Sequence[str], fields: Sequence[str], patience: float, separator: str = _SEPARATOR
) -> tuple[str, str | None]:
    """What squeue prints of the jobs selected, and why it printed nothing."""
    command = ["squeue", "--noheader", *selected, f"--format={separator.join(fields)}"]
    try:  # a job's name may be in any encoding
        asked = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=patience, check=False)
    except FileNotFoundError:
        return "", NO_SLURM
    except subprocess.TimeoutExpired:
        return "", f"SLURM gave no answer within {patience:g} s"
    if asked.returncode != 0:
        return asked.stdout, asked.stderr.strip().partition("\n")[0] or f"squeue returned {asked.returncode}"
    return asked.stdout, None


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
        found[number] = QueuedJob(state=state, nodes=nodes, **_when(reason, start))
    return found


def _when(reason: str, start: str) -> dict[str, str | None]:
    return {
        "reason": None if reason in ("None", "") else reason.strip("()"),
        "start": None if start in ("N/A", "") else start,
    }
