"""Paths on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpdist.config.constraints import expand_home
from dpdist.errors import InputError


def path_argument(text: str) -> Path:
    """The `type` of an argument that is a path: `~` is expanded, which no shell does in `--to=~/there`."""
    try:
        return Path(expand_home(text, "path"))
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.remedy}") from None
