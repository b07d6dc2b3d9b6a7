"""The options of commands that submit jobs: whose hours, where, and how many cores."""

from __future__ import annotations

import argparse

from dpdist.errors import InputError

#: Options of sbatch that may stand without a value.
_FLAGS = ("hold", "exclusive", "no-requeue", "contiguous", "spread-job", "use-min-nodes", "overcommit", "oversubscribe")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--cpus-per-task`, `--account`, `--partition`, `--sbatch` and `--site`."""
    add = parser.add_argument
    add("--cpus-per-task", type=int, default=8, metavar="N", help="cores of each process (8)")
    add("--account", help="overrides the site file's SBATCH_ACCOUNT")
    add("--partition", help="overrides the site file's SBATCH_PARTITION")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="option=value",
        help="a further option of sbatch, such as qos=normal or hold; may be repeated",
    )
    add("--site", help="site file; default DPDIST_SITE, or slurm/site.sh where there is one")


def chosen(options: argparse.Namespace) -> dict[str, str | bool]:
    """What of them goes to sbatch by name.

    Raises:
        InputError: an `--sbatch` that is not `option=value`, nor an option without a value.
    """
    sbatch: dict[str, str | bool] = {
        name: value for name in ("account", "partition") if (value := getattr(options, name)) is not None
    }
    for item in options.sbatch:
        name, equals, value = item.lstrip("-").partition("=")
        if not name or not (equals or name in _FLAGS):
            raise InputError("--sbatch", item, f"write option=value, such as qos=normal, or {', '.join(_FLAGS)} alone.")
        sbatch[name] = value if equals else True
    return sbatch
