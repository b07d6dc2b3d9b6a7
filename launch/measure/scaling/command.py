"""`dpdist scaling`: the command line of a sweep. It imports JAX only once there is something to do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument
from dpdist_launch.slurm import options as sbatch
from dpdist_launch.slurm.request import seconds_of

_DESCRIPTION = """\
Measure the throughput of CONFIG at every node count, for every arm, and write tables and plots. A point (arm, node
count, repeat) is a job of its own. The same command again goes on: finished points stay, running jobs are waited for,
failed points are tried again; more nodes, arms or repeats may be added. Nothing that is trained is kept.
Exit codes: 0 all measured, 75 interrupted (run it again), 2 bad input, 1 a point failed.
"""
_EPILOG = """\
arms:
  dp                    DP-SGD as the config says
  sgd                   privacy.enabled=false, the same programs: sums locally, one all-reduce a step
  sgd-sync-every-batch  no privacy, an all-reduce after every physical batch, as common data-parallel wrappers do

files in DIR: sweep.json (what is measured), points/ (one JSON a point), jobs/ (logs, for you alone), and the reports
scaling.md, scaling.csv, scaling.json, throughput.png, fraction_of_ideal.png, amdahl.png

examples:
  dpdist scaling configs/digits.yaml --nodes 1,2 --cluster local
  dpdist scaling configs/fashion_mnist.yaml --nodes 1,2,4,8,20 --gpus-per-node 4 --repeats 3
  dpdist scaling --collect scaling/fashion_mnist
"""


def add_to(commands: Any) -> None:
    """Add the subcommand."""
    scaling = commands.add_parser(
        "scaling",
        help="throughput over node counts, as jobs of SLURM or here; tables and plots",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = scaling.add_argument
    add("config", nargs="?", metavar="CONFIG", help="YAML file, see configs/; left out with --collect alone")
    add("overrides", nargs="*", metavar="key=value", help="config overrides, e.g. training.physical_batch_size=32")
    add("--nodes", help="node counts, separated by commas: 1,2,4,8")
    add("--arms", default="dp,sgd,sgd-sync-every-batch", help="arms, separated by commas (all three)")
    add("--repeats", type=int, default=1, help="measure every point so often (1)")
    add(
        "--gpus-per-node",
        type=int,
        default=1,
        help="processes of one device on each node; with --cluster local the CPU devices of each process (1)",
    )
    add("--steps", type=int, default=20, help="measured steps of a point, after 3 that are not (20)")
    add("--cluster", choices=("slurm", "local"), default="slurm", help="submit jobs (the default), or run here")
    add("--jobs", type=int, default=4, help="SLURM jobs at once (4); 1 keeps them off each other's network")
    add("--to", type=path_argument, metavar="DIR", help="directory of the sweep (scaling/ and the name of CONFIG)")
    add("--time", default="01:00:00", metavar="HH:MM:SS", help="wall time of each SLURM job (01:00:00)")
    add(
        "--longest-wait",
        metavar="HH:MM:SS",
        help="give a point up, and cancel its SLURM job, once that has waited so long in the queue (no limit)",
    )
    add(
        "--collect",
        type=path_argument,
        metavar="DIR",
        help="only write the reports of what DIR holds, and say what it lacks",
    )
    sbatch.add_options(scaling)
    scaling.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Sweep or collect, as the options say; returns the exit code."""
    if options.collect is not None:
        if options.config is not None:
            raise InputError("CONFIG", options.config, "leave it out: --collect takes all from its directory.")
        from dpdist_launch.measure.scaling.sweep import collect

        return collect(options.collect)
    if options.config is None:
        raise InputError("CONFIG", None, "name a YAML file, or give --collect DIR.")
    if options.nodes is None:
        raise InputError("--nodes", None, "give node counts, such as 1,2,4.")
    nodes = _nodes(options.nodes)
    longest = seconds_of(options.longest_wait, "--longest-wait") if options.longest_wait is not None else None
    from dpdist.config import file as configfile
    from dpdist_launch.measure.scaling.sweep import Request, sweep

    config = configfile.load(options.config, options.overrides)
    return sweep(
        Request(
            config=config,
            source=(options.config, *options.overrides),
            nodes=nodes,
            arms=tuple(part.strip() for part in options.arms.split(",") if part.strip()),
            repeats=options.repeats,
            gpus_per_node=options.gpus_per_node,
            steps=options.steps,
            cluster=options.cluster,
            jobs=options.jobs,
            to=options.to or Path("scaling") / Path(options.config).stem,
            time=options.time,
            cpus_per_task=options.cpus_per_task,
            sbatch=sbatch.chosen(options),
            site=options.site,
            longest_wait=longest,
        )
    )


def _nodes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError("--nodes", text, "give whole numbers, separated by commas, such as 1,2,4.") from None
