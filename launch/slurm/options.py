"""The options of commands that submit jobs: whose hours, where, and how many cores."""

from __future__ import annotations

import argparse

from dpdist.errors import InputError


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
        help="a further option of sbatch; may be repeated",
    )
    add("--site", help="site file; default DPDIST_SITE, or slurm/site.sh where there is one")


def chosen(options: argparse.Namespace) -> dict[str, str]:
    """What of them goes to sbatch by name.

    Raises:
        InputError: an `--sbatch` that is not `option=value`.
    """
    sbatch = {name: value for name in ("account", "partition") if (value := getattr(options, name)) is not None}
    for item in options.sbatch:
        name, equals, value = item.removeprefix("--").partition("=")
        if not name or not equals:
            raise InputError("--sbatch", item, "write option=value, such as qos=normal.")
        sbatch[name] = value
    return sbatch
