"""`dpdist predict`: what an exported model, or a run, says of new examples."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    predict = commands.add_parser(
        "predict",
        help="what an exported model says of new examples: CSV, JSON lines or .npy",
        description="Load EXPORT (a directory that `dpdist export` has made, or a run), predict every example of DATA, "
        "and write the predictions. DATA is a .npz of columns, a .npy of the one column that the model reads, a "
        "directory of .npy columns, SOURCE:PATH with a built-in source, a YAML file with a `data` section, or "
        "module:function. Columns, shapes and dtypes must be those of training.",
    )
    predict.add_argument("export", type=path_argument, metavar="EXPORT")
    predict.add_argument("data", metavar="DATA")
    predict.add_argument("--to", type=path_argument, metavar="FILE", help=".csv, .jsonl or .npy (JSON lines to stdout)")
    predict.add_argument("--part", choices=("all", "train", "test"), default="all", help="of DATA with parts (all)")
    predict.add_argument("--batch-size", type=int, default=256, metavar="N", help="examples computed at once (256)")
    predict.add_argument(
        "--allow-code",
        action="store_true",
        help="run the module:function that EXPORT names as its model, if you trust it",
    )
    predict.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the predictions; what was written goes to stderr as one line."""
    from dpdist.release.examples import open_examples
    from dpdist.release.predictions import write_predictions
    from dpdist.release.trained_run import load

    if options.batch_size < 1:
        raise InputError("--batch-size", options.batch_size, "give at least 1.")
    trained = load(options.export, allow_code=options.allow_code)
    source = open_examples(options.data, known=trained.config.data, columns=trained.columns, part=options.part)
    count = write_predictions(trained, source, options.to, batch_size=options.batch_size)
    if options.to is not None:
        told = {"to": str(options.to), "examples": count, "guarantee": trained.privacy["guarantee"]}
        print(json.dumps(told), file=sys.stdout)
    return 0
