"""`dpdist submit`: a run, or a sweep of them, as jobs of SLURM."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist_launch.slurm import options as sbatch
from dpdist_launch.slurm.scontrol import Status

#: Time between two looks at the jobs of a sweep.
_POLL_SECONDS = 5.0
EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 128 + signal.SIGINT


def add_to(commands: Any) -> None:
    """Add the subcommand."""
    submit = commands.add_parser(
        "submit",
        help="train a config as a SLURM job, or a sweep of it as an array of jobs",
        description="Submit CONFIG as a SLURM job of one process a GPU. Preempted or short of time, it saves, goes "
        "back to the queue, and goes on; a run that has ended as CONFIG asks is not queued. Prints one JSON object; "
        "with --follow also the log and the summary, and "
        "the exit code is 0 only if the run has finished, 130 after Ctrl-C. With --sweep, every combination of the "
        "values is a run below the run directory, all of them one array of jobs; the same line again resumes those "
        "that have not ended, and prints where all stand and what choosing the best of them costs.",
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
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="train once for each value, such as optimizer.learning_rate=0.1,0.3,1; several make a grid",
    )
    add("--at-most", type=int, metavar="K", help="jobs of a sweep that run side by side at most (4)")
    add("--paths-on-nodes", action="store_true", help="data and weights are not here but on the compute nodes")
    add("--follow", action="store_true", help="show the log until the job ends; Ctrl-C leaves the job alone")
    submit.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Submit, and follow if that is asked for; returns the exit code."""
    from dpdist.config import file as configfile

    named = {} if options.run_dir is None else {"run.dir": options.run_dir}
    if options.sweep:
        make = functools.partial(configfile.load, options.config, options.overrides)
        return _sweep(lambda settings: make({**named, **settings}), options)
    if options.at_most is not None:
        raise InputError("--at-most", options.at_most, "belongs to --sweep.")
    return _one(configfile.load(options.config, options.overrides, named), options)


def _one(config: Config, options: argparse.Namespace) -> int:
    from dpdist.run.directory import RunDirectory
    from dpdist_launch.slurm.job import JobFailedError
    from dpdist_launch.slurm.submit import running, submit

    if (summary := RunDirectory(Path(config.run.dir)).ended(config)) is not None:
        return _nothing_to_do(config, summary, follow=options.follow)
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


def _nothing_to_do(config: Config, summary: Mapping[str, Any], *, follow: bool) -> int:
    """Say that the run has ended as `config` asks, in the form in which a job would be told of."""
    root, status, step = Path(config.run.dir).absolute(), summary["status"], summary["step"]
    print(f"{root} is {status} at step {step} of {summary['steps']}: nothing is queued", file=sys.stderr)
    print(json.dumps({"job": None, "state": status, "reason": None, "run_dir": str(root), "log": None}))
    if follow:
        print(json.dumps(summary))
    return EXIT_DONE


def _sweep(make: Callable[[Mapping[str, Any]], Config], options: argparse.Namespace) -> int:
    from dpdist_launch.slurm.request import Request
    from dpdist_launch.slurm.sweep import plan_sweep
    from dpdist_launch.slurm.sweep_table import as_text, standing

    sweep = plan_sweep(make, axes(options.sweep))
    at_once = 4 if options.at_most is None else options.at_most
    job = sweep.submit(Request(**_request(options)), at_once=at_once, paths_on_nodes=options.paths_on_nodes)
    found = standing(sweep)
    try:
        while options.follow and any(not point["ended"] and _goes_on(point["state"]) for point in found["points"]):
            time.sleep(_POLL_SECONDS)
            before, found = found, standing(sweep)
            for old, new in zip(before["points"], found["points"], strict=True):
                if old["state"] != new["state"]:
                    print(f"{new['point']} (job {new['job']}): {new['state']}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("the jobs go on; the same command follows them again", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(as_text(found), file=sys.stderr)
    print(json.dumps({"job": job} | found))
    return EXIT_DONE if not options.follow or all(point["ended"] for point in found["points"]) else EXIT_FAILED


def _goes_on(state: str) -> bool:
    return not Status(state.partition(" ")[0]).ended


def axes(given: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each `key=a,b,c`, which are YAML; quote one that holds a comma.

    Raises:
        InputError: one is not of that form, or a key is given twice.
    """
    from dpdist.config.file import parse

    found: dict[str, list[Any]] = {}
    for item in given:
        name, equals, text = item.partition("=")
        remedy = "write key=a,b,c, such as optimizer.learning_rate=0.1,0.3,1."
        if not equals:
            raise InputError("--sweep", item, remedy)
        if name in found:
            raise InputError("--sweep", item, f"{name} is swept already; give all its values at once.")
        try:
            found[name] = parse(f"[{text}]")
        except yaml.YAMLError:
            raise InputError("--sweep", item, remedy) from None
    return found


def _request(options: argparse.Namespace) -> dict[str, Any]:
    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time", "site")
    return {name: getattr(options, name) for name in names} | {"sbatch": sbatch.chosen(options)}
