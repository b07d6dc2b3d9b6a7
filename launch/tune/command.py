"""`dpdist tune`: search for hyper-parameters, release the best model alone, state what the search costs."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument
from dpdist_launch.slurm import options as sbatch

EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 1, 75, 130
#: Seconds between two lines that say that the search goes on.
_SAY_SECONDS = 30.0


def add_to(commands: Any) -> None:
    """Add the subcommand."""
    tune = commands.add_parser(
        "tune",
        help="search for hyper-parameters privately: only the best model is released, and epsilon is the search's",
        description="Train CONFIG under settings drawn at random from SPACE, a random number of times that has mean "
        "K, and release the best model alone, as an export in SWEEP/best. privacy.target_epsilon is that of the whole "
        "search. Here, or with --nodes as SLURM jobs. The same command goes on after any kill, without drawing again. "
        "Prints SWEEP/summary.json. Exit codes: 0 done, 1 no trial gave a model, 75 asked to stop and saved, 2 bad "
        "input. See docs/tuning.md.",
    )
    add = tune.add_argument
    add("config", metavar="CONFIG", help="YAML file, see configs/")
    add("overrides", nargs="*", metavar="key=value", help="config overrides")
    add("--space", type=path_argument, required=True, metavar="FILE", help="YAML: setting: [values] or {uniform: ...}")
    add("--run-dir", required=True, metavar="SWEEP", help="directory of the search; one that has begun goes on")
    add_law(tune, required=True)
    add("--target-epsilon", type=float, metavar="EPSILON", help="of the whole search: privacy.target_epsilon")
    metric = tune.add_mutually_exclusive_group()
    metric.add_argument("--maximize", metavar="METRIC", help="the test metric that the best has the most of")
    metric.add_argument("--minimize", metavar="METRIC", help="or the least of (by default the task's own)")
    add("--at-most", type=int, default=1, metavar="M", help="trials that run side by side at most (1)")
    add("--processes", type=int, metavar="P", help="here: processes of each trial")
    add("--nodes", type=int, help="as SLURM jobs: nodes of each trial")
    add("--gpus-per-node", type=int, default=0, metavar="GPUS", help="default 0: train on CPUs")
    add("--tasks-per-node", type=int, metavar="N", help="processes a node, if not one a GPU")
    add("--time", default="24:00:00", help="time limit of a trial's job as sbatch takes it (24:00:00)")
    sbatch.add_options(tune)
    tune.set_defaults(run=run)


def add_law(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add `--trials` and `--distribution`."""
    text = "expected number of trials; the true one is drawn, and secret"
    parser.add_argument("--trials", type=float, required=required, metavar="K", help=text)
    parser.add_argument(
        "--distribution",
        default="geometric",
        metavar="NAME",
        help="of the number of trials: geometric (the default), logarithmic, poisson, or the shape of a truncated "
        "negative binomial distribution, such as 0.5",
    )


def law_of(options: argparse.Namespace) -> Any:
    """The law of the number of trials.

    Raises:
        InputError: there is no bound for it.
    """
    from dpdist.config.nearest import did_you_mean
    from dpdist.joint.selection import SHAPES, Law

    name = options.distribution
    if name == "fixed":
        raise InputError(
            "--distribution",
            name,
            "the best of a known number of trials costs what releasing all of them costs: `dpdist submit --sweep` "
            "releases them all at that price, and `dpdist plan CONFIG --trials K` shows it.",
        )
    try:
        shape = SHAPES[name] if name in SHAPES else float(name)
    except ValueError:
        meant = did_you_mean(name, SHAPES)
        raise InputError("--distribution", name, f"{meant}give {', '.join(SHAPES)} or a shape, from 0 on.") from None
    try:
        return Law(options.trials, shape)
    except ValueError as error:
        what, value = ("--trials", options.trials) if "trials" in str(error) else ("--distribution", name)
        raise InputError(what, value, f"{error}.") from None


def cost_of(report: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """For the report of `dpdist plan`: what its run costs in a search, and if everything were released.

    Raises:
        InputError: the run has no privacy, or there is no bound for such a search.
    """
    from dpdist.joint import selection
    from dpdist.mechanism.composition import Phase
    from dpdist.run.calibration import UnreachableBudgetError

    law, privacy = law_of(options), report["privacy"]
    if privacy["epsilon"] is None:
        raise InputError("--trials", options.trials, "the run has no privacy (privacy.enabled=false); leave it out.")
    delta, target = privacy["delta"], privacy["epsilon"]
    trial = Phase(report["sampling_probability"], privacy["noise_multiplier"], report["steps"])
    number = math.ceil(law.mean)
    try:
        sigma = selection.calibrate_search(
            target_epsilon=target,
            sampling_probability=trial.sampling_probability,
            steps=trial.steps,
            law=law,
            delta=delta,
        )
    except UnreachableBudgetError:
        sigma = None
    return law.to_record() | {
        "epsilon_of_one_run": target,
        "epsilon_of_search": selection.search_cost(selection.trial_divergences(trial), law, delta).epsilon,
        "runs_released": number,
        "epsilon_of_all_released": selection.best_of_fixed(trial, number, delta).epsilon,
        "noise_multiplier_of_search": sigma,
    }


def run(options: argparse.Namespace) -> int:
    """Search; returns the exit code."""
    if options.at_most < 1:
        raise InputError("--at-most", options.at_most, "give at least 1.")
    if options.processes is not None and (options.processes < 1 or options.nodes is not None):
        raise InputError("--processes", options.processes, "give at least 1, and not with --nodes.")
    from dpdist.cluster.lease import Lease
    from dpdist.run.progress import say
    from dpdist_launch.tune.best import release
    from dpdist_launch.tune.search import Search, open_directory

    question = _question(options)
    root = Path(question.config.run.dir).absolute()
    with Lease.acquire(open_directory(root), question.config.cluster.lease_timeout):
        search = Search(root, question)
        if search.summary.exists():
            summary = json.loads(search.summary.read_text())
        else:
            terms = search.terms
            say(
                f"dpdist: a search of {question.law.mean:g} expected trials ({question.law.name}), which costs epsilon "
                f"{terms.epsilon:.4g} at delta {terms.delta:g} (one trial alone: {terms.epsilon_of_one_trial:.4g}); "
                f"noise multiplier {terms.trial.noise_multiplier:.4g}. Until it ends, nothing of it is shown."
            )
            try:
                if not _search(options, search):
                    say("dpdist: what was done is saved: the same command goes on from there")
                    return EXIT_PREEMPTED
            except KeyboardInterrupt:
                say("dpdist: interrupted; the same command goes on (jobs of SLURM run on meanwhile)")
                return EXIT_INTERRUPTED
            summary = release(search)
    if summary["best"] is None:
        say(f"dpdist: no trial gave a model to release; epsilon {summary['epsilon']:.4g} is spent all the same")
    print(json.dumps(summary))
    return EXIT_FAILED if summary["best"] is None else EXIT_DONE


def _question(options: argparse.Namespace) -> Any:
    from dpdist.config import file as configfile
    from dpdist.data import open_dataset
    from dpdist.data.checks import fingerprints
    from dpdist_launch.tune.metric import choose_metric
    from dpdist_launch.tune.space import read_space
    from dpdist_launch.tune.terms import Question

    law, named = law_of(options), {"run.dir": options.run_dir}
    if options.target_epsilon is not None:
        named["privacy.target_epsilon"] = options.target_epsilon
    config = configfile.load(options.config, options.overrides, named)
    data = open_dataset(config.data)
    return Question(
        config=config,
        space=read_space(options.space),
        law=law,
        metric=choose_metric(config.model, maximize=options.maximize, minimize=options.minimize),
        dataset_size=len(data.train),
        fingerprints=fingerprints(data.train, data.test),
    )


def _search(options: argparse.Namespace, search: Any) -> bool:
    """Run what is left; returns whether all is done."""
    from dpdist.run.progress import say

    began = said = time.monotonic()

    def searching() -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= _SAY_SECONDS:
            said = now
            minutes, seconds = divmod(math.floor(now - began), 60)
            say(f"dpdist: searching, {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")

    if options.nodes is None:
        from dpdist_launch.tune.here import run_here

        return run_here(search, at_once=options.at_most, processes=options.processes, searching=searching)
    from dpdist_launch.tune.under_slurm import run_under_slurm

    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time", "site")
    request = {name: getattr(options, name) for name in names} | {"sbatch": sbatch.chosen(options)}
    run_under_slurm(search, request, at_once=options.at_most, searching=searching)
    return True
