"""`dpdist submit`: a run, or a sweep of them, as jobs of SLURM."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Any

from dpdist.config import Config
from dpdist_launch.slurm import options as sbatch

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 128 + signal.SIGINT


def add_to(commands: Any) -> None:
    """Add the subcommand."""
    submit = commands.add_parser(
        "submit",
        help="train a config as a SLURM job, or a sweep of it as an array of jobs",
        description="Submit CONFIG as a SLURM job of one process a GPU. Preempted or short of time, it saves, goes "
        "back to the queue, and goes on. Prints one JSON object; with --follow also the log and the summary, and "
        "the exit code is 0 only if the run has finished, 130 after Ctrl-C.",
    )
    add = submit.add_argument
    add("config", metavar="CONFIG", help="YAML file, see configs/")
    add("overrides", nargs="*", metavar="key=value", help="config overrides")
    add("--nodes", type=int, required=True)
    add("--gpus-per-node", type=int, default=0, metavar="GPUS", help="default 0: train on CPUs")
    add("--tasks-per-node", type=int, metavar="N", help="processes a node, if not one a GPU")
    add("--time", default="24:00:00", help="time limit as sbatch takes it (24:00:00)")
    sbatch.add_options(submit)
    add("--run-dir", help="the run directory (run.dir), on a file system all nodes share")
    add("--paths-on-nodes", action="store_true", help="data and weights are not here but on the compute nodes")
    add("--follow", action="store_true", help="show the log until the job ends; Ctrl-C leaves the job alone")
    submit.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Submit, and follow if that is asked for; returns the exit code."""
    from dpdist.config import file as configfile

    named = {} if options.run_dir is None else {"run.dir": options.run_dir}
    config = configfile.load(options.config, options.overrides, named)
    return _one(config, options)


def _one(config: Config, options: argparse.Namespace) -> int:
    from dpdist_launch.slurm.job import JobFailedError
    from dpdist_launch.slurm.submit import running, submit

    job = running(config.run.dir) if options.follow else None
    if job is None:
        job = submit(config, paths_on_nodes=options.paths_on_nodes, **_request(options))
    now = job.status()
    shown = {"job": job.id, "state": now.state, "reason": now.reason or None}
    print(json.dumps(shown | {"run_dir": str(job.run_dir), "log": str(job.log())}), flush=True)
    if not options.follow:
        return EXIT_DONE
    try:
        job.follow()
        print(json.dumps(job.result()))
    except KeyboardInterrupt:
        print(f"job {job.id} goes on; `scancel {job.id}` ends it, the same command follows it again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except JobFailedError as error:
        print(f"dpdist: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _request(options: argparse.Namespace) -> dict[str, Any]:
    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time", "site")
    return {name: getattr(options, name) for name in names} | {"sbatch": sbatch.chosen(options)}
