"""`dpdist report`: a run, a sweep or a comparison of runs as one HTML page."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    report = commands.add_parser(
        "report",
        help="a run, a sweep or a comparison of runs as one HTML page",
        description="Write one HTML page about RUN, or about several compared: the guarantee in plain words, what all "
        "of them cost together, curves, where the time went, what happened, settings. It holds public numbers only, "
        "unless --private is given, and loads nothing from elsewhere. A sweep stands for its points, a folder for the "
        "runs in it.",
    )
    report.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run, sweep, or folder of them")
    report.add_argument(
        "--to", type=path_argument, required=True, metavar="FILE.html", help="written anew if it is there"
    )
    report.add_argument("--title", help="of the page (the runs' names)")
    report.add_argument("--audit", type=path_argument, metavar="FILE", help="what `dpdist audit --json` printed")
    report.add_argument("--private", action="store_true", help="training loss, gradient norms and clipping too")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page; one line says where."""
    if options.to.suffix not in (".html", ".htm"):
        raise InputError("--to", str(options.to), "name a file that ends in .html.")
    if not options.to.parent.is_dir():
        raise InputError("--to", str(options.to), "its folder is not there; make it first.")
    audit = None if options.audit is None else _audit(options.audit)
    from dpdist.report.page import page
    from dpdist.report.read import read_run
    from dpdist.run.directory import write_atomically

    named = [each for given in options.runs for each in _members(given)]
    roots = list(dict.fromkeys(root for each in named for root in _runs_of(each)))
    told = [read_run(root, private=options.private) for root in roots]
    together = _together(named) if len(told) > 1 else None
    title = options.title or ", ".join(dict.fromkeys(given.resolve().name for given in options.runs))
    text = page(told, title=title, together=together, audit=audit)
    write_atomically(options.to, text, mode=0o600 if options.private else 0o644)
    print(json.dumps({"to": str(options.to), "runs": len(told), "private": options.private}), file=sys.stdout)
    return 0


def _members(given: Path) -> list[Path]:
    """The runs, sweeps and searches in a folder that is none of them; what it is, or is not, else."""
    marks = ("config.yaml", "ledger.jsonl", "sweep.json", "search.json")
    if not given.is_dir() or any((given / mark).exists() for mark in marks):
        return [given]
    inside = [each for each in sorted(given.iterdir()) if any((each / mark).exists() for mark in marks[1:])]
    return inside or [given]


def _runs_of(given: Path) -> list[Path]:
    """The runs that a path stands for: those points of a sweep that have begun, or the run itself."""
    if (given / "search.json").exists():
        remedy = "holds a search: its trials are private, and its best model has a statement (best/PRIVACY.md)."
        raise InputError("RUN", str(given), remedy)
    try:
        asked = json.loads((given / "sweep.json").read_text())["asked"]
        points = [given / point["name"] for points in asked for point in points]
    except FileNotFoundError:
        return [given]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError("RUN", str(given), "its sweep.json is not whole; name its points one by one.") from None
    begun = [point for point in points if (point / "ledger.jsonl").exists()]
    if not begun:
        raise InputError("RUN", str(given), "no point of this sweep has begun.")
    return begun


def _together(given: Sequence[Path]) -> dict[str, Any] | str:
    """What all cost together, or why that cannot be said."""
    from dpdist.joint.compose import compose

    try:
        return compose(given)
    except InputError as error:
        return str(error)


def _audit(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text())
        numbers = {name: float(told[name]) for name in ("epsilon_lower", "epsilon_claimed", "confidence")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"is not what `dpdist audit --json` prints ({type(error).__name__})."
        raise InputError("--audit", str(file), remedy) from None
    if not all(math.isfinite(value) and value >= 0 for value in numbers.values()) or not 0 < numbers["confidence"] < 1:
        raise InputError("--audit", str(file), "its numbers are none that `dpdist audit` prints.")
    return numbers
