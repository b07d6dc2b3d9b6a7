"""Jobs on a SLURM cluster from Python, through submitit.

submitit writes the batch script, with the lines of `script.py`, and carries the function to every task of its `srun`.
What submitit does about time-outs is left out: its signal lets rank 0 exit alone. SLURM sends TERM instead, which JAX
takes for a preemption notice; all ranks leave together, and the batch shell puts the job back into the queue
(slurm/job.sh), outside of signal handlers.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist_launch.ranks import outdated_summary
from dpdist_launch.slurm import script
from dpdist_launch.slurm.job import Job, TrainingJob, attach, job_folder

#: Seconds between a notice and the kill at the time limit, as in slurm/train_80gpu.sh.
GRACE = 300


def submit(
    config: str | Path | Config,
    *,
    nodes: int,
    gpus_per_node: int = 0,
    tasks_per_node: int | None = None,
    cpus_per_task: int = 8,
    overrides: Mapping[str, Any] | None = None,
    time: str = "24:00:00",
    sbatch: Mapping[str, str] | None = None,
    site: str | Path | None = None,
) -> TrainingJob:
    """Submit a training run; it is resumed where its directory holds one already.

    Args:
        config: a YAML file, or a `Config`.
        nodes: how many.
        gpus_per_node: 0 asks for none, for training on CPUs.
        tasks_per_node: processes a node; None is one a GPU, or one where there is none.
        cpus_per_task: cores of each process, for XLA and the threads that read data.
        overrides: config values by dotted name, such as `{"privacy.clip_norm": 0.5}`; only with a file.
        time: the time limit as sbatch takes it, `days-hours:minutes:seconds`. A run that needs longer saves 300 s
            before it and is requeued.
        sbatch: further options of sbatch, such as `{"account": "project", "partition": "gpu"}`.
        site: the site file; None is DPDIST_SITE, or slurm/site.sh where there is one.

    Raises:
        InputError: the config or the request cannot be used, or the run already has a job; nothing was submitted.
    """
    if isinstance(config, Config):
        if overrides:
            raise InputError("overrides", dict(overrides), "belong to a config file; change the Config itself.")
    else:
        config = configfile.load(config, [f"{name}={json.dumps(value)}" for name, value in (overrides or {}).items()])
    run_dir = Path(config.run.dir).absolute()
    if (earlier := attach(run_dir)) is not None and not earlier.ended():
        raise InputError(
            "run.dir",
            str(run_dir),
            f"job {earlier.id} ({earlier.state()}) is on this run already; follow it, cancel it, or name another one.",
        )
    tree = config_module.to_dict(config)
    tree["run"]["dir"] = str(run_dir)
    try:
        RunDirectory(run_dir).private.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "run.dir", str(run_dir), f"cannot be written ({error.strerror}); name another directory."
        ) from None
    outdated = outdated_summary(config)
    job = submit_function(
        _train_task,
        tree,
        folder=job_folder(run_dir),
        name=run_dir.name,
        nodes=nodes,
        tasks_per_node=tasks_per_node or max(1, gpus_per_node),
        gpus_per_node=gpus_per_node or None,
        cpus_per_task=cpus_per_task,
        time=time,
        sbatch=sbatch,
        site=site,
        run_dir=run_dir,
    )
    write_atomically(job_folder(run_dir) / "job.json", json.dumps({"job": job.id, "outdated": outdated}) + "\n")
    return TrainingJob(job.id, run_dir, outdated)


def submit_function(
    function: Callable[..., None],
    *arguments: Any,
    folder: Path,
    name: str,
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int | None,
    cpus_per_task: int = 8,
    time: str = "24:00:00",
    sbatch: Mapping[str, str] | None = None,
    site: str | Path | None = None,
    run_dir: Path | None = None,
) -> Job:
    """Submit a job that calls `function(*arguments)` in every task of one `srun` step.

    Args:
        function: importable by its module's name; what it returns is ignored.
        folder: for script and logs, on a file system that the nodes share.
        run_dir: the run directory of a job that trains, whose `summary.json` tells how the job ended.

    Raises:
        InputError: there is no SLURM here, or it refused the request; the error quotes it.
    """
    for field, value in (("--nodes", nodes), ("--tasks-per-node", tasks_per_node), ("--cpus-per-task", cpus_per_task)):
        if value < 1:
            raise InputError(field, value, "give at least 1.")
    if gpus_per_node is not None and gpus_per_node < 1:
        raise InputError("--gpus-per-node", gpus_per_node, "give at least 1, or 0 to train on CPUs.")
    if gpus_per_node is not None and tasks_per_node > gpus_per_node:
        raise InputError(
            "--tasks-per-node", tasks_per_node, f"each process needs a GPU of its own, and a node has {gpus_per_node}."
        )
    options = dict(sbatch or {})
    site = script.site_file(site)
    with script.submission_environment(site, options) as environ:
        try:
            executor = submitit.SlurmExecutor(folder, python=script.python(environ))
        except RuntimeError:
            raise InputError("srun", None, "there is no SLURM on this machine; see slurm/virtual_cluster.sh.") from None
        executor.update_parameters(
            job_name=name,
            nodes=nodes,
            ntasks_per_node=tasks_per_node,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task,
            # srun no longer inherits the number of CPUs from sbatch, and opens the logs of a requeued job anew.
            srun_args=["--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cpus_per_task}", "--open-mode=append"],
            setup=script.setup(site, run_dir),
            teardown=['end_job "$?"'],
            # submitit gives each job the workload key `submitit`, which sites that check keys refuse.
            wckey=None,
            additional_parameters={"time": time, "signal": f"TERM@{GRACE}", "requeue": True} | options,
        )
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints there what it raises
                return Job(executor.submit(function, *arguments).job_id, Path(folder))
        except submitit.core.utils.FailedJobError as error:
            raise InputError(
                "sbatch", f"{nodes} x {tasks_per_node}", f"SLURM refused: {' '.join(str(error).split())}"
            ) from None


def _train_task(tree: dict[str, Any]) -> None:
    """One task of a training job. It returns, and submitit notes a result, only where the run has ended."""
    import signal

    from dpdist_launch.training import EXIT_DONE, train_here

    # submitit ignores TERM from here on. Until JAX takes it over, it must end the process, and the job is requeued.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = train_here(config_module.from_dict(tree))
    if code != EXIT_DONE:
        os._exit(code)
