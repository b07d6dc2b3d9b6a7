"""The digest of an export's parameters, from their names alone: no model is built, and no code of an export is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from dpdist.config.file import parse
from dpdist.joint.members import BROKEN
from dpdist.release.exported import CONFIG, PARAMS
from dpdist.run.fingerprints import params_digest


def names_tell(export: Path) -> bool:
    """Whether names alone tell how the model holds its parameters: it is one of dpdist's, in dpdist's own format."""
    try:
        section = parse((export / CONFIG).read_text())["model"]
        return (export / PARAMS).exists() and ":" not in str(section["name"])
    except (*BROKEN, OSError, yaml.YAMLError):
        return True


def digests_by_name(path: Path) -> set[str]:
    """`params_digest` of a file's arrays as a tree of dicts, and where numbered levels are lists.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    arrays = load_file(path)
    return {params_digest(_nested(arrays, lists=lists)) for lists in (False, True)}


def _nested(arrays: Mapping[str, np.ndarray], *, lists: bool) -> Any:
    if set(arrays) == {""}:
        return arrays[""]
    below: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        name, _, rest = path.partition("/")
        below.setdefault(name, {})[rest] = array
    tree = {name: _nested(inner, lists=lists) for name, inner in below.items()}
    numbers = [str(number) for number in range(len(tree))]
    return [tree[number] for number in numbers] if lists and tree.keys() == set(numbers) else tree
