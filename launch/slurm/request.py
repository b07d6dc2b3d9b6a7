"""What a job asks SLURM for, checked before anything is put into the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError
from dpdist_launch.slurm import verdict

#: Seconds between a notice and the kill at the time limit, as in slurm/train_80gpu.sh.
GRACE = 300
#: Seconds that a job needs, beside the grace, to start and to take steps at all.
START_UP = 300

#: Options of sbatch that a request has a name of its own for, and that name.
_NAMED = {
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "tasks-per-node": "--tasks-per-node",
    "ntasks": "--nodes and --tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "time": "--time",
}
#: Options under which the job would not be the one that is followed here, and why.
_REFUSED = {
    "array": "every job of it would train the same run; use --sweep",
    "wrap": "dpdist writes the script",
    "wait": "use --follow",
    "output": "the logs are in private/slurm/ of the run directory",
    "error": "the logs are in private/slurm/ of the run directory",
    "test-only": "nothing would be submitted",
    "parsable": "dpdist reads what sbatch says",
    "quiet": "dpdist reads what sbatch says",
    "clusters": "a job is looked for on the cluster of SLURM_CONF",
    "job-name": "a job is called after its run directory, by which it is found again",
}
_SHORT = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "t": "time", "a": "array", "o": "output", "e": "error"} | {
    "W": "wait", "Q": "quiet", "M": "clusters", "H": "hold", "p": "partition", "A": "account", "q": "qos",
    "C": "constraint", "J": "job-name", "G": "gpus", "w": "nodelist", "x": "exclude", "d": "dependency",
}  # fmt: skip
#: Options, and variables of sbatch, that ask for GPUs without `gpus_per_node`.
_GPU_OPTIONS = ("gpus", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-node", "tres-per-task")
_GPU_VARIABLES = tuple(f"SBATCH_{name.upper().replace('-', '_')}" for name in (*_GPU_OPTIONS, "gpus-per-node"))


@dataclass(frozen=True, kw_only=True)
class Request:
    """Nodes, processes and time of a job, or of each job of an array."""

    nodes: int
    #: 0 asks for none.
    gpus_per_node: int = 0
    #: Processes a node; None is one a GPU, or one where there is none.
    tasks_per_node: int | None = None
    #: Cores of each process, for XLA and the threads that read data.
    cpus_per_task: int = 8
    #: As sbatch takes it.
    time: str = "24:00:00"
    #: Further options of sbatch by their long names; True for one without a value.
    sbatch: Mapping[str, str | bool] = field(default_factory=dict)
    #: The site file; None is DPDIST_SITE, or slurm/site.sh where there is one.
    site: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}", value, "give at least 1.")
        if self.gpus_per_node < 0:
            raise InputError("--gpus-per-node", self.gpus_per_node, "give at least 1, or 0 to train on CPUs.")
        if self.gpus_per_node and self.tasks > self.gpus_per_node:
            raise InputError(
                "--tasks-per-node",
                self.tasks,
                f"each process needs a GPU of its own, and a node has {self.gpus_per_node}.",
            )
        object.__setattr__(self, "sbatch", {_long_name(name): value for name, value in self.sbatch.items()})
        for name, value in self.sbatch.items():
            if name in _NAMED:
                raise InputError(f"--sbatch {name}", value, f"give {_NAMED[name]} instead.")
            if name in _REFUSED:
                raise InputError(f"--sbatch {name}", value, f"leave it out: {_REFUSED[name]}.")
        seconds = seconds_of(self.time)
        if seconds is not None and seconds < GRACE + START_UP:
            least = f"00:{(GRACE + START_UP) // 60}:00"
            remedy = (
                f"give at least {least}: a job is told to save {GRACE} s before its limit, and needs time to start."
            )
            raise InputError("--time", self.time, remedy)

    @property
    def tasks(self) -> int:
        """Processes a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def asks_for_gpus(self, environ: Mapping[str, str]) -> bool:
        """Whether the job will have GPUs; `environ` is what sbatch sees, with the site's variables."""
        by_option = any(name in self.sbatch for name in _GPU_OPTIONS)
        return self.gpus_per_node > 0 or by_option or any(environ.get(name) for name in _GPU_VARIABLES)

    def options(self, name: str) -> dict[str, Any]:
        """Of `submitit.slurm.slurm._make_sbatch_string`, for a job of this name."""
        defaults: dict[str, Any] = {"time": self.time, "signal": f"TERM@{GRACE}"}
        if "no-requeue" not in self.sbatch:
            defaults["requeue"] = True
        return {
            "job_name": name,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_task,
            # srun no longer inherits the number of CPUs from sbatch, and opens the logs of a requeued job anew.
            "srun_args": [
                "--kill-on-bad-exit=1",
                "--wait=60",
                f"--cpus-per-task={self.cpus_per_task}",
                "--open-mode=append",
            ],
            # submitit gives each job the workload key `submitit`, which sites that check keys refuse.
            "wckey": None,
            "additional_parameters": defaults | dict(self.sbatch),
        }


def _long_name(name: str) -> str:
    """`partition` of `-p`, `--partition` or `partition`."""
    bare = name.lstrip("-").replace("_", "-")
    return _SHORT.get(bare, bare)


def seconds_of(limit: str, field: str = "--time") -> float | None:
    """Seconds of a time limit as sbatch takes it, which was given as `field`; None is no limit.

    Raises:
        InputError: it is none.
    """
    if str(limit).upper() in ("INFINITE", "UNLIMITED", "0", "-1"):
        return None
    seconds = verdict.seconds_of(str(limit))
    if seconds is None:
        hint = did_you_mean(limit, ("UNLIMITED",)) if isinstance(limit, str) else ""
        remedy = f"{hint}write days-hours:minutes:seconds, such as 24:00:00 or 2-12:00:00."
        raise InputError(field, limit, remedy)
    return seconds
