"""Training runs, and other functions, as SLURM jobs from Python.

submitit writes the batch script, with the lines of `script.py`, and carries the function to every task of its `srun`.
What submitit does about time-outs is left out: its signal lets rank 0 exit alone. SLURM sends TERM instead, which JAX
takes for a preemption notice; all ranks leave together, and the batch shell puts the job back into the queue
(slurm/job.sh), outside of signal handlers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory
from dpdist_launch.slurm import sbatch as queue
from dpdist_launch.slurm import script
from dpdist_launch.slurm.check import require_runnable
from dpdist_launch.slurm.job import Job, TrainingJob, attach, job_folder
from dpdist_launch.slurm.request import Request
from dpdist_launch.slurm.scontrol import Identity, cluster_name


def submit(
    config: str | Path | Config,
    *,
    nodes: int,
    gpus_per_node: int = 0,
    tasks_per_node: int | None = None,
    cpus_per_task: int = 8,
    overrides: Mapping[str, Any] | None = None,
    time: str = "24:00:00",
    sbatch: Mapping[str, str | bool] | None = None,
    site: str | Path | None = None,
    paths_on_nodes: bool = False,
) -> TrainingJob:
    """Submit a training run; it is resumed where its directory holds one already. May be called from several threads.

    Args:
        config: a YAML file, or a `Config`.
        nodes: how many.
        gpus_per_node: 0 asks for none, for training on CPUs.
        tasks_per_node: processes a node; None is one a GPU, or one where there is none.
        cpus_per_task: cores of each process, for XLA and the threads that read data.
        overrides: config values by dotted name, such as `{"privacy.clip_norm": 0.5}`; only with a file.
        time: the time limit as sbatch takes it, `days-hours:minutes:seconds`. A run that needs longer saves 300 s
            before it and is requeued.
        sbatch: further options of sbatch, such as `{"account": "project", "partition": "gpu", "hold": True}`.
        site: the site file; None is DPDIST_SITE, or slurm/site.sh where there is one.
        paths_on_nodes: data and weights are on the compute nodes alone; do not look for them here.

    Raises:
        InputError: the config or the request cannot be used, or the run already has a job; nothing was submitted.
    """
    config = as_config(config, overrides)
    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        sbatch=sbatch or {},
        site=site,
    )
    require_runnable(config, request, paths_on_nodes=paths_on_nodes)
    config = in_absolute_directory(config)
    run_dir = Path(config.run.dir)
    if (earlier := running(run_dir)) is not None:
        raise InputError(
            "run.dir",
            str(run_dir),
            f"job {earlier.id} ({earlier.status()}) is on this run already; follow it, cancel it, or name another one "
            f"(if there is no such job any more, remove {job_folder(run_dir) / 'job.json'}).",
        )
    RunDirectory(run_dir).open_private()
    (job_id,), identity = submit_calls(
        [(train_task, (config_module.to_dict(config),))],
        folder=job_folder(run_dir),
        name=run_dir.name,
        request=request,
        run_dirs=[run_dir],
    )
    job = TrainingJob(job_id, run_dir, config, identity=identity)
    job.record()
    return job


def as_config(config: str | Path | Config, overrides: Mapping[str, Any] | None) -> Config:
    """The config of a file and overrides, or the `Config` itself.

    Raises:
        InputError: it cannot be used, or there are overrides of a `Config`.
    """
    if not isinstance(config, Config):
        return configfile.load(config, settings=overrides or {})
    if overrides:
        raise InputError("overrides", dict(overrides), "belong to a config file; change the Config itself.")
    return config


def in_absolute_directory(config: Config) -> Config:
    """`config` with an absolute run directory, which all nodes understand alike."""
    tree = config_module.to_dict(config)
    tree["run"]["dir"] = str(Path(config.run.dir).absolute())
    return config_module.from_dict(tree)


def running(run_dir: str | Path) -> TrainingJob | None:
    """The job that is on the run of this directory, queued or at work; None where there is none."""
    job = attach(run_dir)
    return None if job is None or job.ended() else job


def submit_function(function: Callable[..., None], *arguments: Any, folder: Path, name: str, request: Request) -> Job:
    """Submit a job that calls `function(*arguments)` in every task of one `srun` step; it trains no run.

    Args:
        function: importable by its module's name; what it returns is ignored.
        folder: for script and logs, on a file system that the nodes share.

    Raises:
        InputError: there is no SLURM here, or it refused the request; the error quotes it.
    """
    (job,), identity = submit_calls([(function, arguments)], folder=folder, name=name, request=request)
    return Job(job, folder, identity)


def submit_calls(
    calls: Sequence[queue.Call],
    *,
    folder: Path,
    name: str,
    request: Request,
    run_dirs: Sequence[Path] = (),
    at_once: int | None = None,
) -> tuple[list[str], Identity]:
    """Submit one job of one call, or one array of several; returns their numbers and what they are.

    Args:
        run_dirs: the run directories of jobs that train, whose `summary.json` tell how they ended.
        at_once: of an array, how many of its jobs run side by side.

    Raises:
        InputError: there is no SLURM here, or it refused the request.
    """
    site = script.site_file(request.site)
    environ = script.submission_environment(site)
    options = request.options(name) | {"setup": script.setup(site, run_dirs), "teardown": ['end_job "$?"']}
    numbers = queue.submit(calls, folder, options, python=script.python(environ), environ=environ, at_once=at_once)
    return numbers, Identity(cluster=cluster_name(), name=name, folder=str(folder))


def train_task(tree: dict[str, Any]) -> None:
    """One task of a training job. It returns, and submitit notes a result, only where the run has ended."""
    import signal

    from dpdist_launch.training import EXIT_DONE, train_here

    # submitit ignores TERM from here on. Until JAX takes it over, it must end the process, and the job is requeued.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = train_here(config_module.from_dict(tree))
    if code != EXIT_DONE:
        os._exit(code)
