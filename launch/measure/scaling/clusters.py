"""Where the jobs of a sweep run: as processes of this machine, or under SLURM."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpdist import config as config_module
from dpdist.config import Config
from dpdist_launch.local import run_part
from dpdist_launch.measure.scaling.directory import Point, SweepDirectory
from dpdist_launch.ranks import PYTHON
from dpdist_launch.slurm.scontrol import Status

#: Lines of a local job's log that are shown when it failed.
_LAST_LINES = 8


class PointJob(Protocol):
    """A job of one point; `dpdist_launch.slurm.job.Job` is one."""

    @property
    def id(self) -> str: ...
    def status(self) -> Status: ...
    def last_lines(self) -> str: ...
    def cancel(self) -> None: ...


class Cluster(Protocol):
    """What a sweep needs of a cluster."""

    @property
    def poll_seconds(self) -> float:
        """Time between two looks at the jobs."""

    def start(self, point: Point, arguments: dict[str, Any], directory: SweepDirectory) -> PointJob:
        """Submit the job of a point; `arguments` are those of `dpdist_launch.measure.scaling.point.run`."""

    def adopt(self, record: dict[str, Any]) -> PointJob | None:
        """The job that an earlier call submitted, or None where there is none that could still run."""


@dataclass(frozen=True)
class EndedJob:
    """A local job: it has ended when `start` returns."""

    code: int
    log: Path
    #: What it had to write.
    result: Path
    id: str = "here"

    def status(self) -> Status:
        """How it ended, in SLURM's words."""
        if self.code == 0 and not self.result.exists():
            return Status("FAILED", "although every process returned 0")
        return Status("COMPLETED") if self.code == 0 else Status("FAILED", f"exit code {self.code}")

    def cancel(self) -> None:
        """Nothing: it has ended."""

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


@dataclass(frozen=True, kw_only=True)
class Local:
    """A node is one process of this machine, with so many virtual CPU devices; one job at a time."""

    devices_per_node: int
    poll_seconds: float = 0.0

    def start(self, point: Point, arguments: dict[str, Any], directory: SweepDirectory) -> PointJob:
        """Run the job to its end.

        Raises:
            KeyboardInterrupt: this process was told to stop, by SIGINT or SIGTERM, and the job has ended.
        """
        request, log = directory.jobs / f"{point.name}.request", directory.jobs / f"{point.name}.log"
        request.write_text(json.dumps(arguments))
        # The launcher copies the ranks' output to sys.stdout and sys.stderr, which are the user's.
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = run_part(
                [str(request)],
                point.nodes,
                self.devices_per_node,
                program=(*PYTHON, "-m", "dpdist_launch.measure.scaling.point"),
            )
        return EndedJob(code, log, directory.result(point))

    def adopt(self, record: dict[str, Any]) -> PointJob | None:
        """None: a local job dies with the sweep that started it."""
        return None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A node is a node, with one process a GPU."""

    gpus_per_node: int
    #: False asks SLURM for no GPUs (cluster.platform=cpu).
    use_gpus: bool
    #: Wall time of each job, as sbatch takes it.
    time: str
    #: Cores of each process.
    cpus_per_task: int
    #: Further options of sbatch, such as account and partition.
    sbatch: dict[str, str | bool]
    #: The site file; None is the usual one.
    site: str | None
    poll_seconds: float = 5.0

    def start(self, point: Point, arguments: dict[str, Any], directory: SweepDirectory) -> PointJob:
        """Submit the job and return at once."""
        from dpdist_launch.measure.scaling.point import run
        from dpdist_launch.slurm.request import Request
        from dpdist_launch.slurm.submit import submit_function

        request = Request(
            nodes=point.nodes,
            tasks_per_node=self.gpus_per_node,
            gpus_per_node=self.gpus_per_node if self.use_gpus else 0,
            cpus_per_task=self.cpus_per_task,
            time=self.time,
            site=self.site,
            sbatch=self.sbatch,
        )
        name = f"dpdist-{point.name}"
        return submit_function(run, *arguments.values(), folder=directory.jobs, name=name, request=request)

    def adopt(self, record: dict[str, Any]) -> PointJob | None:
        """The job of a record, if there is one and it has not ended."""
        if "identity" not in record:
            return None
        from dpdist_launch.slurm.job import Job
        from dpdist_launch.slurm.scontrol import Identity

        job = Job(record["id"], Path(record["folder"]), Identity(**record["identity"]))
        return None if job.ended() else job


def config_for(config: Config, cluster: str, gpus_per_node: int) -> Config:
    """`config` with the devices that each process of the sweep has."""
    tree = config_module.to_dict(config)
    if cluster == "local":
        tree["cluster"] |= {"platform": "cpu", "devices_per_process": gpus_per_node}
    else:
        tree["cluster"]["devices_per_process"] = 1
    return config_module.from_dict(tree)
