"""A job that was submitted: its state, its log, its result.

submitit's own handle asks `sacct` alone, which clusters without accounting do not answer, and takes a job for ended
once a task has left a result, also one that went back to the queue.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist_launch.ranks import final_summary
from dpdist_launch.slurm import scontrol
from dpdist_launch.slurm.scontrol import Identity, Status

#: Lines that an error shows of a log.
_SHOWN_LINES = 15


class JobFailedError(RuntimeError):
    """A job ended without a result; the message has its state and the last lines of the rank that failed first."""


class Job:
    """A job that was submitted, in this Python or in an earlier one.

    Args:
        job_id: SLURM's number; of a job of an array with the place in it, such as 12_0.
        folder: where its script and the logs of its ranks are.
        identity: what the job of that number must be; None takes any for it.
    """

    def __init__(self, job_id: str, folder: Path, identity: Identity | None = None) -> None:
        self.id = job_id
        self.folder = Path(folder)
        self.identity = identity

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id}, {self.status(timeout=2.0)}, folder={str(self.folder)!r})"

    def status(self, *, timeout: float = scontrol.PATIENCE) -> Status:
        """SLURM's state and reason; the controller has `timeout` seconds to answer."""
        return scontrol.status(self.id, self.identity, timeout)

    def state(self) -> str:
        """SLURM's word for it, such as PENDING; FORGOTTEN for a job it no longer knows, UNKNOWN without an answer."""
        return self.status().state

    def ended(self) -> bool:
        """True once the job is over; a requeued one is not."""
        return self.status().ended

    def wait(self, *, timeout: float | None = None, poll_seconds: float = 5.0) -> str:
        """Wait for the end, for as long as it takes; returns the last state.

        Raises:
            TimeoutError: it has not ended in `timeout` seconds; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (now := self.status()).ended:
            left = poll_seconds if deadline is None else min(poll_seconds, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"job {self.id} is {now} after {timeout:g} s, and goes on")
            time.sleep(left)
        return now.state

    def log(self, rank: int = 0) -> Path:
        """What the rank wrote to stderr; rank 0's also has what `srun` and the batch script say."""
        return self.folder / f"{self.id}_{rank}_log.err"

    def last_lines(self) -> str:
        """The batch script's reason, and the last lines of the rank that failed first (of rank 0 if none did)."""
        main = _lines(self.log())
        reason = [line for line in main if line.startswith(("dpdist job:", "slurmstepd: error:"))][-1:]
        failed = [found[1] for line in main if (found := re.match(r"srun: error: [^ ]+: tasks? (\d+)", line))][:1]
        rank = int(failed[0]) if failed else 0
        own = [line for line in _lines(self.log(rank)) if not line.startswith(("srun:", "dpdist job:", "submitit "))]
        if not own and not reason:
            return f"{self.log()} holds nothing: the job never started, or {self.folder} is not on a shared file system"
        return "\n".join([*reason, f"rank {rank} ended with ({self.log(rank)}):", *own[-_SHOWN_LINES:]])

    def follow(self, stream: TextIO | None = None, *, poll_seconds: float = 1.0) -> str:
        """Copy rank 0's log to `stream` (stderr) while it is written, until the job ends; returns the last state."""
        stream = sys.stderr if stream is None else stream
        position, known = 0, None
        while True:
            now = self.status()
            if self.log().exists():
                with self.log().open(errors="replace") as file:
                    file.seek(position)
                    stream.write(file.read())
                    position = file.tell()
            if now != known:
                stream.write(f"job {self.id}: {now}\n")
                known = now
            stream.flush()
            if now.ended:
                return now.state
            time.sleep(poll_seconds)

    def cancel(self) -> None:
        """End the job now, without saving; `scancel --signal=TERM` would have it save and go back to the queue.

        Raises:
            InputError: SLURM knows no such job, or cannot be asked; nothing was cancelled.
        """
        now = self.status()
        if now.state in ("UNKNOWN", "FORGOTTEN"):
            raise InputError("job", self.id, f"is {now}: nothing was cancelled; see squeue on the cluster it is on.")
        subprocess.run(["scancel", self.id], check=True)


class TrainingJob(Job):
    """A training run as a job.

    Args:
        job_id: SLURM's number.
        run_dir: the run directory, an absolute path.
        config: what was asked for, which tells a summary of this job from one that lay there before.
        folder: where its script and logs are; None is the run's own `job_folder`.
        identity: what the job of that number must be; None takes any for it.
    """

    def __init__(
        self,
        job_id: str,
        run_dir: Path,
        config: Config | None = None,
        *,
        folder: Path | None = None,
        identity: Identity | None = None,
    ) -> None:
        super().__init__(job_id, folder or job_folder(run_dir), identity)
        self.run_dir = Path(run_dir)
        self.config = config

    def summary(self) -> dict[str, Any] | None:
        """What `summary.json` says of the run that was asked for; None where that has not ended."""
        if self.config is None:
            return final_summary(self.run_dir, None)
        return RunDirectory(self.run_dir).ended(self.config)

    def result(self, *, timeout: float | None = None, poll_seconds: float = 5.0) -> dict[str, Any]:
        """Wait for the end, preemptions and requeues included; returns what `summary.json` says.

        Raises:
            JobFailedError: the job ended before the run did.
            TimeoutError: the job has not ended in `timeout` seconds; it goes on.
        """
        state = self.wait(timeout=timeout, poll_seconds=poll_seconds)
        if state in ("COMPLETED", "FORGOTTEN") and (summary := self.summary()) is not None:
            return summary
        raise JobFailedError(f"job {self.id} is {state}: {self.last_lines()}")

    def record(self) -> None:
        """Write down that this is the job of its run, for `attach`."""
        if self.identity is None or self.config is None:
            raise ValueError("only a job that was submitted here can be recorded")
        known = {
            "job": self.id,
            "name": self.identity.name,
            "cluster": self.identity.cluster,
            "folder": str(self.folder),
            "config": config_module.to_dict(self.config),
        }
        job_folder(self.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(_record(self.run_dir), json.dumps(known) + "\n", mode=0o600)


def attach(run_dir: str | Path) -> TrainingJob | None:
    """The job that was last submitted for this run directory, or None.

    Raises:
        InputError: what is written down of it is not whole.
    """
    record = _record(Path(run_dir))
    if not record.exists():
        return None
    try:
        known = json.loads(record.read_text())
        identity = Identity(cluster=known["cluster"], name=known["name"], folder=known["folder"])
    except (ValueError, KeyError):
        remedy = "does not say which job it is; see squeue, and remove the file if there is none."
        raise InputError("job.json", str(record), remedy) from None
    try:
        config = config_module.from_dict(known["config"])
    except InputError:  # of another version of dpdist
        config = None
    return TrainingJob(known["job"], Path(run_dir).absolute(), config, folder=Path(identity.folder), identity=identity)


def _record(run_dir: Path) -> Path:
    return job_folder(run_dir) / "job.json"


def job_folder(run_dir: Path) -> Path:
    """For script and logs of a run's jobs. Under `private/`, where a new run directory may hold something already."""
    return RunDirectory(Path(run_dir).absolute()).private / "slurm"


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []
