"""Batch jobs on the virtual cluster: submitting the real scripts, telling them to leave, and waiting for what comes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs import Run, children, wait_for

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "train_80gpu.sh"
#: Seconds within which any job must have ended: many times what the slowest needs on two idle cores.
LIMIT = 420.0


@dataclass(frozen=True)
class Batch:
    """A job, and the log it writes."""

    id: str
    log: Path
    slurm: dict[str, str]

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.slurm, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def has_ended(self) -> bool:
        """Whether the start that began last has said its last line."""
        return "dpdist job:" in self.text.rpartition("\n+ job ")[2]

    def state(self) -> str:
        """SLURM's word, such as RUNNING or, of a job that ended, COMPLETED; SILENT where it does not answer in time.

        A controller that shares two cores with eighty ranks may not; whoever asks asks again.
        """
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", self.id],
            env=self.slurm,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        found = re.search(r"JobState=(\w+)", shown.stdout)
        assert found is not None or "Invalid job id" not in shown.stderr, shown.stderr
        return found[1] if found is not None else "SILENT"

    def wait(self, seconds: float = LIMIT) -> str:
        """The state in which the job ended; a requeued one has not."""

        def ended() -> str | None:
            state = self.state()
            return state if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SILENT") else None

        try:
            return wait_for(ended, seconds, every=0.2)
        except AssertionError:
            subprocess.run(["scancel", self.id], env=self.slurm, check=False)
            raise AssertionError(f"job {self.id} has not ended in {seconds} s:\n{self.text}") from None

    def wait_for_step(self, run: Run, step: int) -> None:
        """Until the run has recorded `step` or a later one."""

        def reached() -> bool:
            assert not self.has_ended, f"ended before step {step}:\n{self.text}"
            return any(record["step"] >= step for record in run.diagnostics)

        wait_for(reached, LIMIT, every=0.05)

    def wait_for_text(self, text: str) -> None:
        """Until the log holds `text`."""

        def said() -> bool:
            assert text in self.text or not self.has_ended, f"it ended without {text!r}:\n{self.text}"
            return text in self.text

        wait_for(said, LIMIT, every=0.1)

    def leave(self) -> None:
        """TERM to all ranks, as SLURM sends it ahead of a preemption or a time limit; until it is back in the queue."""
        self.ask("scancel", "--signal=TERM", self.id)
        self.wait_until_requeued()

    def wait_until_requeued(self) -> None:
        wait_for(lambda: self.state() == "PENDING", LIMIT, every=0.1)

    def wait_until_excluded(self, node: str) -> None:
        """Until SLURM will not give the job this node again."""
        wait_for(lambda: f"ExcNodeList={node}" in self.ask("scontrol", "show", "job", self.id), LIMIT, every=0.1)

    def start_again(self) -> None:
        """`start_requeued`, for this job."""
        start_requeued(self.id, self.slurm)

    def tasks(self) -> dict[int, int]:
        """Process ids of the ranks that run now, by rank."""
        found = {}
        for daemon in self.daemons():
            for pid in children(daemon):
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    variables = Path(f"/proc/{pid}/environ").read_text()
                    if rank := re.search(r"\0SLURM_PROCID=(\d+)\0", variables):
                        found[int(rank[1])] = pid
        return found

    def daemons(self, node: str = "*", step: str = r"\d+") -> list[int]:
        """Process ids of the slurmstepd of this job's steps on a node: and of this cluster."""
        found = []
        for directory in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if re.match(rf"slurmstepd: \[{self.id}\.{step}\]", (directory / "cmdline").read_text()):
                    logs = [file.readlink() for file in (directory / "fd").iterdir()]
                    ours = str(Path(self.slurm["SLURM_CONF"]).parent / "log" / f"{node}.log")
                    found += [int(directory.name)] * any(log.match(ours) for log in logs)
        return found


def start_requeued(job_id: str, environ: Mapping[str, str], *, called: str | None = None) -> None:
    """Spare a requeued job the two minutes that SLURM holds it, once its former start is gone from the nodes.

    Started while that is still leaving one, it fails without a word. So it does in the second in which its former
    credential was revoked ("already killed, do not launch"), which is not over yet: not before the next one, then. A
    job of an array is `called` 12_0, say.
    """
    former = rf"slurmstepd: \[{job_id}\."
    wait_for(lambda: subprocess.run(["pgrep", "-f", former], check=False).returncode == 1, LIMIT, every=0.1)
    subprocess.run(["scontrol", "update", f"JobId={called or job_id}", "StartTime=now+1"], env=environ, check=True)


def sbatch(
    slurm: dict[str, str],
    script: Path,
    *arguments: str,
    nodes: int,
    tasks_per_node: int,
    log: Path,
    options: tuple[str, ...] = (),
    cwd: Path = REPOSITORY,
    **environ: str,
) -> Batch:
    """Submit `script` as it is; what a node count or a site would change comes as options of sbatch."""
    known = {"DPDIST_HOME": str(REPOSITORY)}
    if not (REPOSITORY / ".venv/bin/dpdist").exists():
        known["DPDIST"] = str(Path(sys.executable).with_name("dpdist"))
    done = subprocess.run(
        [
            "sbatch",
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks_per_node}",
            f"--output={log}",
            *options,
            str(script),
            *arguments,
        ],
        env=slurm | known | environ,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Batch(done.stdout.split()[-1], log, slurm | {"PATH": os.environ["PATH"]})
