"""The questions of `dpdist privacy` about runs: compose."""

from __future__ import annotations

import argparse
import json
from typing import Any

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


def _compose(options: argparse.Namespace) -> int:
    from dpdist.joint.compose import as_text, compose

    same = None
    if options.check_data:
        from dpdist_launch.privacy.same_data import compared

        same = compared(options.runs)
    found = compose(options.runs, at_once=options.at_once, delta=options.delta, same_data=same)
    print(json.dumps(found) if options.json else as_text(found))
    return 0
