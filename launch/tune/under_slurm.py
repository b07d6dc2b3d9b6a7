"""The trials of a search as SLURM jobs, at most so many at once in the queue; each is a `dpdist submit` of its own.

Not one array of all: its size would tell everyone who reads the queue how many trials there are. The jobs go on
without this process, and the next one takes them up; it must be there to put the next trials into the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dpdist_launch.slurm.job import attach
from dpdist_launch.slurm.scontrol import ask
from dpdist_launch.slurm.submit import submit
from dpdist_launch.tune.search import Search, Trial

#: Seconds between two looks at the jobs.
_POLL = 2.0
#: Seconds in which a job that is cancelled is gone.
_PATIENCE = 120.0


def run_under_slurm(search: Search, request: Mapping[str, Any], *, at_once: int, searching: Callable[[], None]) -> None:
    """Submit the trials that are left and wait for their ends.

    Args:
        request: what `submit` takes beside the config.
        at_once: how many are in the queue at most, waiting or at work.

    Raises:
        InputError: SLURM refuses the request.
    """
    waiting, queued = search.left(), list[Trial]()
    for trial in list(waiting):
        if _at_work(trial):  # of a launcher that was killed
            waiting.remove(trial)
            queued.append(trial)
    while waiting or queued:
        while waiting and len(queued) < at_once:
            trial = waiting.pop(0)
            _submit(search, trial, request)
            queued.append(trial)
        time.sleep(_POLL)
        searching()
        for trial in list(queued):
            search.watch(trial)
            if _at_work(trial):
                continue
            queued.remove(trial)
            if trial.ended() is None:
                job = attach(trial.run.root)
                search.note_failure(trial, "lost" if job is None else f"job {job.id} is {job.status()}")
            if not search.over(trial):
                waiting.append(trial)


def _at_work(trial: Trial) -> bool:
    job = attach(trial.run.root)
    return job is not None and not job.ended()


def _submit(search: Search, trial: Trial, request: Mapping[str, Any]) -> None:
    search.begin(trial)
    if attach(trial.run.root) is None:
        _end_jobs_called(trial.name)
    if trial.config is None:
        raise ValueError(f"{trial.name} cannot be run")
    submit(trial.config, **request)


def _end_jobs_called(name: str) -> None:
    """End what a launcher put into the queue that was killed before it noted the job; the name is a trial's own."""
    deadline = time.monotonic() + _PATIENCE
    while ask("squeue", "--noheader", "--format=%A", f"--name={name}").stdout.split() and time.monotonic() < deadline:
        ask("scancel", f"--name={name}")
        time.sleep(_POLL)
