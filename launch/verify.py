"""`dpdist verify`: whether an export's privacy statement holds, for the one who receives it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dpdist_launch.paths import path_argument


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    verify = commands.add_parser(
        "verify",
        help="whether an export's privacy statement holds: for the one who receives a model",
        description="Check EXPORT (a directory that `dpdist export` has made) without its run: that all files are "
        "those that privacy.json speaks of, and that its numbers follow from each other, epsilon computed again by "
        "both accountants. Print what holds and what is taken on trust. Runs no code of the export. Exit code 0: it "
        "holds, 1: it does not.",
    )
    verify.add_argument("export", type=path_argument, metavar="EXPORT")
    verify.add_argument(
        "--expect",
        metavar="SHA256",
        help="the statement_sha256 that `dpdist export` printed, as the sender told you by another way",
    )
    verify.add_argument(
        "--signer",
        type=path_argument,
        metavar="KEY.pub",
        help="the sender's public SSH key, which must have signed the export (`dpdist export --sign`)",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what was found."""
    from dpdist.release.verify import as_text, verify

    found = verify(options.export, expect=options.expect, signer=options.signer)
    print(json.dumps(found) if options.json else as_text(found))
    return 0 if found["holds"] else 1
