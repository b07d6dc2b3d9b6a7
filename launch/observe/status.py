"""`dpdist status`: all my runs on one screen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.run import events, goodput
from dpdist.run.layout import RunPaths
from dpdist_launch.observe import queue, table
from dpdist_launch.observe.snapshot import Snapshot, is_of_many, is_run, job_of, look
from dpdist_launch.paths import path_argument

#: No wider, also on a terminal that is: the eye loses the row.
_WIDEST = 100
_DEFAULT = Path("runs")
_ABOVE = "\x1b[H\x1b[2J"


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    status = commands.add_parser(
        "status",
        help="all my runs on one screen: state, step, epsilon, time left, goodput, last error",
        description="Show the runs in DIR (a run, or a folder of runs): SLURM's state of those that have a job, what "
        "the run itself says of the others. Reads, writes nothing, and needs no accelerator.",
    )
    status.add_argument("dirs", nargs="*", type=path_argument, metavar="DIR", help="runs or folders of runs (./runs)")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument("--detail", action="store_true", help="also what the node-hours went into, and all events")
    status.add_argument("--watch", type=float, metavar="SECONDS", help="draw it again and again; Ctrl-C ends")
    status.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the status once, or until Ctrl-C."""
    if options.watch is not None and not 0.5 <= options.watch < 1e6:
        raise InputError("--watch", options.watch, "give the seconds between two looks, at least 0.5.")
    answer = None
    while True:
        try:
            answer = _as_json(options) if options.json else _as_text(options)
        except InputError as error:  # a folder may be moved, or not be there yet, while it is watched
            if answer is None or options.json:
                raise
            answer = str(error)
        terminal = options.watch is not None and sys.stdout.isatty() and not options.json
        head = f"{_ABOVE}{table.now()}, every {options.watch:g} s\n" if terminal else ""
        print(head + answer, flush=True)
        if options.watch is None:
            return 0
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:
            return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screen:
    """What there is to show."""

    runs: list[Snapshot]
    #: Jobs without a directory: all where no folder is named, since the config may say where theirs will be; else those
    #: whose command names one in there.
    coming: list[queue.ComingJob]
    #: Why SLURM did not answer; None where it did.
    failure: str | None
    #: Whether a run has a job, of which SLURM could tell.
    submitted: bool


def screen(dirs: Sequence[Path]) -> Screen:
    """The runs in `dirs`, and the jobs that will make some.

    Raises:
        InputError: one of them does not exist and no job will make it, or none was named and there is no ./runs.
    """
    asked = dirs or [_DEFAULT]
    missing = [directory for directory in asked if not directory.is_dir()]
    found = [root for directory in asked if directory not in missing for root in _runs_in(directory, named=bool(dirs))]
    jobs = {root: job for root in found if (job := _job(root)) is not None}
    never_begun = {job for root, job in jobs.items() if not RunPaths(root).ledger.exists()}
    slurm = queue.ask(set(jobs.values()), past=never_begun)
    coming, failure = ([], slurm.failure) if slurm.failure is not None else queue.coming(jobs.values())
    coming = [job for job in coming if job.run_dir is None or not is_run(Path(job.run_dir))]
    if dirs:
        coming = [job for job in coming if any(_makes(job, directory) for directory in dirs)]
    for directory in missing:
        if any(_makes(job, directory) for job in coming) or (coming and not dirs):
            continue
        remedy = "there is no such directory; name runs, or a folder of runs."
        if dirs and failure != queue.NO_SLURM:
            slurms = "no job in the queue names it" if failure is None else f"of jobs nothing is known ({failure})"
            remedy = f"there is no such directory, and {slurms}; a job that sbatch sent makes it as it begins."
        raise InputError("DIR", str(directory), remedy)
    runs = [look(root, slurm) for root in found]
    return Screen(runs=runs, coming=coming, failure=failure, submitted=bool(jobs))


def _makes(job: queue.ComingJob, directory: Path) -> bool:
    """Whether a job will make a directory, or one in it."""
    if job.run_dir is None:
        return False
    # Not `Path.resolve`, which raises where links form a loop.
    return Path(os.path.realpath(job.run_dir)).is_relative_to(os.path.realpath(directory))


def _job(root: Path) -> str | None:
    try:
        return job_of(RunPaths(root))
    except Exception:  # `look` says what is wrong with it
        return None


def _runs_in(directory: Path, *, named: bool) -> list[Path]:
    try:
        return [directory] if is_run(directory) else list(_below(directory)) or ([directory] if named else [])
    except OSError:
        return [directory]


def _below(directory: Path) -> Iterator[Path]:
    """The folders in `directory`, and in place of one that is no run but holds some, as that of a sweep, those."""
    ours = {"private"} if is_of_many(directory) else set()
    for child in sorted(directory.iterdir()):
        if not child.is_dir() or child.name.startswith(".") or child.name in ours:
            continue
        try:
            runs = [] if is_run(child) else [each for each in sorted(child.iterdir()) if each.is_dir() and is_run(each)]
        except OSError:
            runs = []
        yield from runs or [child]


def _as_text(options: argparse.Namespace) -> str:
    found = screen(options.dirs)
    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    lines = []
    if found.runs:
        lines.append(table.text(found.runs, width=width))
    elif not found.coming:
        lines.append(f"no runs in {_DEFAULT}")
    if found.failure is not None and found.submitted:
        lines.append(table.cut(f"states are the runs' own: {found.failure}", width))
    if found.coming:
        lines.append(table.coming(found.coming, width=width))
    if options.detail:
        lines += ["\n" + table.detail(run, *_sources(run)) for run in found.runs if run.state != "not a run"]
    return "\n".join(lines)


def _as_json(options: argparse.Namespace) -> str:
    found = screen(options.dirs)
    records = [dataclasses.asdict(run) for run in found.runs]
    if options.detail:
        for record, each in zip(records, found.runs, strict=True):
            record["time"], summary, record["events"] = _sources(each)
            speed = ("seconds_to_first_step", "examples_per_second", "tflops_per_device", "mfu")
            record |= {name: summary.get(name) for name in speed}
    coming = [dataclasses.asdict(job) for job in found.coming]
    return json.dumps({"runs": records, "coming": coming, "slurm": found.failure or "answered"})


def _sources(run: Snapshot) -> tuple[dict[str, Any] | None, dict[str, Any], list[dict[str, Any]]]:
    """What `table.detail` shows: the record of the time, the summary, the events."""
    paths = RunPaths(Path(run.path))
    try:
        summary = json.loads(paths.summary.read_text())
    except (OSError, ValueError):
        summary = {}
    return goodput.read(paths.goodput), summary if isinstance(summary, dict) else {}, events.read(paths.events)
