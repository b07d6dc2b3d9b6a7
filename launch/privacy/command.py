"""The questions of `dpdist privacy` about several runs: compose and registry."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument


def add_to(questions: Any) -> None:
    """Add the questions to the parser of `dpdist privacy`."""
    compose = questions.add_parser(
        "compose",
        help="joint epsilon of several runs, exports and sweeps over the same records",
        description="Whoever has seen several models of the same records knows more than each alone says. Print what "
        "all of RUN (run directories, exports, sweeps) cost together. Without --at-once, the bound allows for runs "
        "that were planned on seeing results of others.",
    )
    compose.add_argument("runs", nargs="+", type=path_argument, metavar="RUN")
    compose.add_argument(
        "--at-once",
        action="store_true",
        help="you say that all plans (q, sigma, steps, and how many runs) were fixed before any result of one was "
        "seen: a smaller bound holds then. It is no bound if a run was added, dropped or changed on seeing one. Points "
        "of one sweep need no such word: its record says so",
    )
    compose.add_argument("--delta", type=float, help="of the joint guarantee (the smallest of the runs')")
    compose.add_argument(
        "--check-data",
        action="store_true",
        help="open the data of the first run and compare it with the keyed tag of every run whose secret is here",
    )
    compose.add_argument("--json", action="store_true", help="print one JSON object")
    compose.set_defaults(run=_compose)

    registry = questions.add_parser(
        "registry",
        help="what was spent on each dataset of a registry (run.registry), or make one with a budget",
        description="Show the runs that are charged to the registries in DIR, what each costs, and the joint epsilon. "
        "With --create, the owner of a dataset writes its first line, once, before any run: its delta, and the epsilon "
        "that no run may pass.",
    )
    registry.add_argument("folder", type=path_argument, metavar="DIR")
    registry.add_argument("--dataset", metavar="NAME", help="this one alone")
    registry.add_argument("--create", metavar="NAME", help="make the registry of this dataset")
    registry.add_argument("--delta", type=float, help="of the joint guarantee; with --create")
    registry.add_argument("--budget", type=float, metavar="EPSILON", help="not to be passed; with --create (none)")
    registry.add_argument(
        "--charge",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="with --dataset: charge runs, exports and sweeps that were trained without it, budget or not",
    )
    registry.add_argument("--json", action="store_true", help="print one JSON object")
    registry.set_defaults(run=_registry)


def _compose(options: argparse.Namespace) -> int:
    from dpdist.joint.compose import as_text, compose

    same = None
    if options.check_data:
        from dpdist_launch.privacy.same_data import compared

        same = compared(options.runs)
    found = compose(options.runs, at_once=options.at_once, delta=options.delta, same_data=same)
    print(json.dumps(found) if options.json else as_text(found))
    return 0


def _registry(options: argparse.Namespace) -> int:
    from dpdist.joint.charging import charge_spent
    from dpdist.joint.registry import create
    from dpdist.joint.standing import datasets, standing

    if options.create is not None:
        if options.delta is None:
            raise InputError("--delta", None, "--create needs it: the delta of the joint guarantee, such as 1e-5.")
        _require_plain(options.folder, options.create)
        create(options.folder, options.create, delta=options.delta, budget=options.budget)
    if options.charge is not None:
        if options.dataset is None:
            raise InputError("--dataset", None, "--charge needs it: which data they were trained on.")
        _require_plain(options.folder, options.dataset)
        charge_spent(options.folder, options.dataset, options.charge)
    for name in ("delta", "budget"):
        if options.create is None and (value := getattr(options, name)) is not None:
            raise InputError(f"--{name}", value, "belongs to --create: the first line of a registry stays as it is.")
    there = datasets(options.folder)
    wanted = options.dataset or options.create
    if wanted is not None and wanted not in there:
        raise InputError("--dataset", wanted, f"{options.folder} has {', '.join(there)}.")
    found = [standing(options.folder, name) for name in there if wanted in (None, name)]
    print(json.dumps({"datasets": found}) if options.json else "\n\n".join(map(_registry_text, found)))
    return 0


def _require_plain(folder: Path, dataset: str) -> None:
    """Check that a run could give this name."""
    from dpdist.config.schema import Run

    Run(registry=str(folder), registry_dataset=dataset)


def _registry_text(found: dict[str, Any]) -> str:
    from dpdist.joint.compose import rounded_up

    rows = [("run", "steps", "N", "epsilon", "delta")]
    for run in found["runs"]:
        numbers = (str(run["steps"]), str(run["dataset_size"]), rounded_up(run["epsilon"]), f"{run['delta']:g}")
        rows.append((run["run_dir"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    spent = f"{found['dataset']}: joint epsilon {rounded_up(found['epsilon'])} at delta {found['delta']:g}"
    count = len(found["runs"])
    spent += f" of {count} run{'s' if count != 1 else ''}" + (
        f", for {found['runs'][0]['unit']}" if found["runs"] else ""
    )
    budget = "no budget" if found["budget"] is None else f"budget {found['budget']:g}"
    torn = ["the last line is torn: it was never charged, and the next charge replaces it"] if found["torn"] else []
    return "\n".join([*(lines if found["runs"] else []), f"{spent}; {budget}", *torn])
