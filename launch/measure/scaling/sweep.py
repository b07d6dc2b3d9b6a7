"""A sweep: every point is a job; what is measured is never measured again, what runs is never started twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.run.fingerprints import user_code_digest
from dpdist.run.progress import say
from dpdist_launch.measure.machine import versions
from dpdist_launch.measure.scaling import report
from dpdist_launch.measure.scaling.arms import ARMS, config_of
from dpdist_launch.measure.scaling.clusters import Cluster, Local, PointJob, Slurm, config_for
from dpdist_launch.measure.scaling.directory import Point, SweepDirectory, grid, measuring_code
from dpdist_launch.slurm.sbatch import RefusedError
from dpdist_launch.slurm.scontrol import Status

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 75
#: Seconds in which the result of a job that has ended well must become visible on a network file system.
_FILE_SYSTEM_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `dpdist scaling` is asked for."""

    config: Config
    #: How the config was given: the file's path, then the overrides.
    source: tuple[str, ...]
    nodes: tuple[int, ...]
    arms: tuple[str, ...]
    repeats: int = 1
    gpus_per_node: int = 1
    #: Measured steps of each point.
    steps: int = 20
    #: `local` or `slurm`.
    cluster: str = "local"
    #: Most jobs at once; a local job is always alone.
    jobs: int = 4
    #: Where the sweep lives.
    to: Path
    #: Wall time of a SLURM job.
    time: str = "01:00:00"
    #: Cores of each SLURM process.
    cpus_per_task: int = 8
    #: Further options of sbatch.
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    #: The site file of SLURM; None is the usual one.
    site: str | None = None
    #: Seconds that a SLURM job may wait in the queue before its point is given up; None is no limit.
    longest_wait: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("--nodes", self.nodes), ("--arms", self.arms)):
            given = ",".join(map(str, values))
            if not values:
                raise InputError(name, given, "give at least one.")
            if len(set(values)) < len(values):
                raise InputError(name, given, "name each only once; --repeats measures all of them several times.")
        if min(self.nodes) < 1:
            raise InputError("--nodes", ",".join(map(str, self.nodes)), "give counts of at least 1, such as 1,2,4.")
        for arm in self.arms:
            if arm not in ARMS:
                raise InputError("--arms", arm, f"no such arm; the arms are {', '.join(ARMS)}.")
            config_of(arm, self.config)
        for name in ("repeats", "gpus_per_node", "steps", "jobs", "cpus_per_task"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", getattr(self, name), "give at least 1.")

    def description(self) -> dict[str, Any]:
        """What `sweep.json` keeps. `measured` is what all points share: another value makes another sweep."""
        config = config_for(self.config, self.cluster, self.gpus_per_node)
        settings = {k: v for k, v in config_module.flatten(config).items() if not k.startswith("run.")}
        here = versions()
        return {
            "command": ["dpdist", "scaling", *self.source, *self._options()],
            "measured": settings
            | {"--steps": self.steps, "--cluster": self.cluster, "--gpus-per-node": self.gpus_per_node}
            | {"code": measuring_code(), "user code": user_code_digest(self.config)}
            | {name: here[name] for name in ("python", "jax", "jaxlib")},
        }

    def _options(self) -> list[str]:
        options = {
            "--nodes": ",".join(map(str, self.nodes)),
            "--arms": ",".join(self.arms),
            "--repeats": self.repeats,
            "--gpus-per-node": self.gpus_per_node,
            "--steps": self.steps,
            "--cluster": self.cluster,
        }
        return [str(part) for option in options.items() for part in option]

    def at(self) -> Cluster:
        """The cluster that is asked for."""
        if self.cluster == "local":
            return Local(devices_per_node=self.gpus_per_node)
        return Slurm(
            gpus_per_node=self.gpus_per_node,
            use_gpus=self.config.cluster.platform != "cpu",
            cpus_per_task=self.cpus_per_task,
            time=self.time,
            sbatch=self.sbatch,
            site=self.site,
        )


def sweep(request: Request) -> int:
    """Measure what is not measured yet, and write the reports. Returns 0; 1 where a point failed; 75 when told to stop.

    However it ends, the reports hold what there is. Called again, interrupted or not, it goes on: finished points stay
    as they are, jobs that still run are waited for, failed points are tried again.

    Raises:
        InputError: the directory holds another sweep, or the points cannot be compared, or none could be submitted.
    """
    directory = SweepDirectory(request.to.resolve())
    points = grid(request.nodes, request.arms, request.repeats)
    directory.begin(request.description(), points)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C; no JAX runs here
    try:
        with directory.locked():
            failed = _Measuring(request, directory, points).work()
    except KeyboardInterrupt:
        _report(directory)
        say("interrupted; the same command goes on from here (SLURM jobs that were submitted run on)")
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    _report(directory)
    for point in failed:
        say(f"failed: {point}; the same command tries it again")
    return EXIT_FAILED if failed else EXIT_DONE


def collect(root: Path) -> int:
    """Write the reports of a sweep from what there is, and say what is not there; submits nothing."""
    directory = SweepDirectory(root.resolve())
    described, points = directory.read()["measured"], directory.points()
    for point in points:
        if directory.measured(point) is None:
            say(f"{point}: {_standing(directory.record(point), described['--cluster'])}")
    _report(directory)
    return EXIT_DONE


def _report(directory: SweepDirectory) -> None:
    if any(directory.measured(point) for point in directory.points()):
        say(f"{report.write(directory)} and the tables and plots beside it")
    else:
        say(f"nothing is measured yet in {directory.root}: no report")


def _standing(record: dict[str, Any], cluster: str) -> str:
    """Of a point that is not measured: `missing`, `failed` or the state of its job."""
    if "failed" in record:
        return f"failed ({record['failed']})"
    if "identity" not in record or cluster == "local":
        return "missing"
    from dpdist_launch.slurm.job import Job
    from dpdist_launch.slurm.scontrol import Identity

    now = Job(record["id"], Path(record["folder"]), Identity(**record["identity"])).status()
    return f"{'failed' if now.ended else 'running'} (job {record['id']}: {now})"


class _Measuring:
    """The jobs of one call of `sweep`."""

    def __init__(self, request: Request, directory: SweepDirectory, points: Sequence[Point]) -> None:
        self._request, self._directory, self._cluster = request, directory, request.at()
        self._config = config_module.to_dict(config_for(request.config, request.cluster, request.gpus_per_node))
        self._config["run"]["dir"] = str(directory.jobs)
        self._total = len(points)
        self._left = [point for point in points if directory.measured(point) is None]
        self._running: dict[Point, PointJob] = {}
        #: When each running job was first looked at.
        self._since: dict[Point, float] = {}
        self._failed: list[Point] = []
        self._refused: dict[Point, InputError] = {}

    def work(self) -> list[Point]:
        """Until every point is measured, has failed, or cannot be had; returns those that are not measured.

        Raises:
            RefusedError: SLURM took none of them.
        """
        if len(self._left) < self._total:
            say(f"{self._total - len(self._left)} of {self._total} points are measured already")
        self._adopt()
        while self._left or self._running:
            while self._left and len(self._running) < self._request.jobs:
                self._start(self._left.pop(0))
                self._look()
            self._look()
            if self._running:
                time.sleep(self._cluster.poll_seconds)
        if len(self._refused) == self._total:
            raise next(iter(self._refused.values()))
        for point, error in self._refused.items():
            self._directory.write_record(point, {"failed": str(error)})
        return [*self._failed, *self._refused]

    def _adopt(self) -> None:
        for point in list(self._left):
            job = self._cluster.adopt(self._directory.record(point))
            if job is not None:
                say(f"{point}: job {job.id} of an earlier call is {job.status()}")
                self._left.remove(point)
                self._running[point] = job

    def _start(self, point: Point) -> None:
        result = self._directory.result(point)
        arguments = {
            "config": self._config,
            "arm": point.arm,
            "nodes": point.nodes,
            "repeat": point.repeat,
            "steps": self._request.steps,
            "result": str(result),
        }
        if self._request.cluster == "local":
            say(f"{point}: running")
        try:
            job = self._cluster.start(point, arguments, self._directory)
        except RefusedError as error:
            say(f"{point}: cannot be had: {error.remedy}")
            self._refused[point] = error
            return
        identity = getattr(job, "identity", None)
        known = {"identity": asdict(identity)} if identity is not None else {}
        self._directory.write_record(point, {"id": job.id, "folder": str(self._directory.jobs)} | known)
        if self._request.cluster != "local":
            say(f"{point}: submitted as job {job.id}")
        self._running[point] = job

    def _look(self) -> None:
        """Report the jobs that have ended."""
        for point, job in list(self._running.items()):
            now = job.status()
            if (why := self._hopeless(point, now)) is not None:
                job.cancel()
            elif not now.ended:
                continue
            del self._running[point]
            done = self._total - len(self._left) - len(self._running)
            if why is not None:
                self._failed.append(point)
                self._directory.write_record(point, self._directory.record(point) | {"failed": why})
                say(f"[{done}/{self._total}] {point}: cannot be had: job {job.id} was {why}, and is cancelled")
                continue
            measured = self._result(point, job)
            if measured is not None:
                rate, build = measured["examples_per_second"], measured["compile_seconds"]
                say(f"[{done}/{self._total}] {point}: {rate:,.0f} ex/s (compile {build:.0f} s)")
                continue
            self._failed.append(point)
            self._directory.write_record(point, self._directory.record(point) | {"failed": str(now)})
            say(f"[{done}/{self._total}] {point}: failed (job {job.id}: {now}); its last lines:")
            say("\n".join(f"    {line}" for line in job.last_lines().splitlines()))

    def _hopeless(self, point: Point, now: Status) -> str | None:
        """Why the job of a point is not waited for any longer; None where it is."""
        if now.never:
            return str(now)
        longest = self._request.longest_wait
        if now.state != "PENDING" or longest is None:
            return None
        waited = time.monotonic() - self._since.setdefault(point, time.monotonic())
        return f"{now} for longer than {longest:g} s" if waited > longest else None

    def _result(self, point: Point, job: PointJob) -> dict[str, Any] | None:
        deadline = time.monotonic() + _FILE_SYSTEM_SECONDS
        while True:
            measured = self._directory.measured(point)
            if measured is not None or job.status().state != "COMPLETED" or time.monotonic() > deadline:
                return measured
            time.sleep(0.5)
