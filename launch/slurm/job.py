"""A job that was submitted: its state, its log, its result. Asks `scontrol`, and `sacct` what that has forgotten.

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

from dpdist.run.directory import RunDirectory
from dpdist_launch.ranks import final_summary

#: States that a job does not leave by itself.
_ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "FORGOTTEN",
}  # fmt: skip
#: Lines that an error shows of a log.
_SHOWN_LINES = 15


class JobFailedError(RuntimeError):
    """A job ended without a result; the message has its state and the last lines of the rank that failed first."""


class Job:
    """A job that was submitted, in this Python or in an earlier one.

    Args:
        job_id: SLURM's number.
        folder: where its script and the logs of its ranks are.
    """

    def __init__(self, job_id: str, folder: Path) -> None:
        self.id = job_id
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id}, {self.state()}, folder={str(self.folder)!r})"

    def state(self) -> str:
        """SLURM's word for it, such as PENDING; FORGOTTEN for a job it no longer knows, UNKNOWN without an answer."""
        shown = _ask("scontrol", "show", "job", "--oneliner", self.id)
        if found := re.search(r"\bJobState=(\w+)", shown.stdout):
            return found[1]
        if "Invalid job id" not in shown.stderr:
            return "UNKNOWN"
        # The controller forgets a job minutes after its end; the accounting, where there is one, does not.
        recorded = _ask("sacct", "-X", "--noheader", "--parsable2", "--format=State", "-j", self.id).stdout.split()
        return recorded[0] if recorded else "FORGOTTEN"

    def ended(self) -> bool:
        """True once the job is over; a requeued one is not."""
        return self.state() in _ENDED

    def wait(self, *, poll_seconds: float = 5.0) -> str:
        """Wait for the end, for as long as it takes; returns the last state."""
        while (state := self.state()) not in _ENDED:
            time.sleep(poll_seconds)
        return state

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
        position, state = 0, ""
        while True:
            now = self.state()
            if self.log().exists():
                with self.log().open(errors="replace") as file:
                    file.seek(position)
                    stream.write(file.read())
                    position = file.tell()
            if now != state:
                stream.write(f"job {self.id}: {now}\n")
                state = now
            stream.flush()
            if state in _ENDED:
                return state
            time.sleep(poll_seconds)

    def cancel(self) -> None:
        """End the job now, without saving; `scancel --signal=TERM` would have it save and go back to the queue."""
        subprocess.run(["scancel", self.id], check=True)


class TrainingJob(Job):
    """A training run as a job.

    Args:
        job_id: SLURM's number.
        run_dir: the run directory, an absolute path.
        outdated: the summary that lay there when the job was submitted, and that it had to replace.
    """

    def __init__(self, job_id: str, run_dir: Path, outdated: dict[str, Any] | None = None) -> None:
        super().__init__(job_id, job_folder(run_dir))
        self.run_dir = Path(run_dir)
        self._outdated = outdated

    def result(self, *, poll_seconds: float = 5.0) -> dict[str, Any]:
        """Wait for the end, preemptions and requeues included; returns what `summary.json` says.

        Raises:
            JobFailedError: the job ended before the run did.
        """
        state = self.wait(poll_seconds=poll_seconds)
        summary = final_summary(self.run_dir, self._outdated)
        if state in ("COMPLETED", "FORGOTTEN") and summary is not None:
            return summary
        raise JobFailedError(f"job {self.id} is {state}: {self.last_lines()}")


def attach(run_dir: str | Path) -> TrainingJob | None:
    """The job that was last submitted for this run directory, or None."""
    record = job_folder(Path(run_dir)) / "job.json"
    if not record.exists():
        return None
    known = json.loads(record.read_text())
    return TrainingJob(known["job"], Path(run_dir).absolute(), known.get("outdated"))


def job_folder(run_dir: Path) -> Path:
    """For script and logs of a run's jobs. Under `private/`, where a new run directory may hold something already."""
    return RunDirectory(Path(run_dir).absolute()).private / "slurm"


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []
