"""Checks of the data before the first step: labels in range, and the same data on all processes and on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from dpdist.data.sources import ArraySource, BadRecordError, Source, Subset, read_rows, schema
from dpdist.errors import InputError

#: Number of labels checked if each example costs a call of the user's code.
LABELS_CHECKED = 16
#: An array source of up to HASHED_WHOLE bytes is hashed whole; of a larger one, HASHED_ROWS examples are hashed.
HASHED_WHOLE, HASHED_ROWS = 256 << 20, 4096
#: Number of examples hashed if each costs a call of the user's code.
HASHED_ITEMS = 64
#: Number of examples read again, to see that they stay the same.
READ_TWICE = 16
#: Examples held in memory at once while hashing; part of the digest's definition.
BLOCK = 256


def check_labels(source: Source, classes: int, field: str = "model.classes") -> None:
    """Check that the labels are integers in `[0, classes)`; a source without a `label` column passes.

    JAX would not complain: it clamps an index out of range or returns NaN, so training would silently go wrong. All
    labels of an `ArraySource` are checked; of any other source only the first 16, because each example may cost a read
    and a decode.

    Args:
        source: examples whose label column, if any, may have any shape.
        classes: number of classes, a public constant.
        field: the config field that set `classes`, named in the error.

    Raises:
        InputError: the labels are not integers, or one is out of range; the error does not say which, because labels
            are private; its cause, a `BadRecordError`, does.
    """
    labels = _labels(source)
    if labels is None:
        return
    if labels.dtype.kind not in "iu":
        row = np.empty(labels.shape[1:], labels.dtype)
        raise InputError("data.source", _described("label", row), f"labels are integers from 0; {_convert(row)}.")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = np.argwhere((labels < 0) | (labels >= classes))
        raise InputError(
            field,
            classes,
            f"some labels lie outside 0 to {classes - 1}; set model.classes to the number of classes of the task, "
            "and number them from 0.",
        ) from BadRecordError(f"{len(wrong)} labels, the first {labels[tuple(wrong[0])]}, of example {wrong[0][0]}")


def require_class_labels(example: Mapping[str, Any], part: str) -> None:
    """Check that an example has one integer class as its `label`, which `cross_entropy` and the accuracy compare with.

    Args:
        example: what has the shape and dtype of each column of one example.
        part: `train` or `test`, to be named in the error.

    Raises:
        InputError: there is no such column, or it holds something else, such as one-hot rows.
    """
    needs = f"each {part} example needs one integer class as its label"
    if "label" not in example:
        columns = ", ".join(sorted(example))
        raise InputError("data.source", f"columns {columns}", f"{needs}; add a column named 'label'.")
    label = example["label"]
    if label.shape != () or label.dtype.kind not in "iu":
        raise InputError("data.source", _described("label", label), f"{needs}, of shape []; {_convert(label)}.")


def require_values(example: Mapping[str, Any]) -> None:
    """Check that every column of one example holds at least one value.

    Raises:
        InputError: one holds none; its shape is in the error.
    """
    for name, value in example.items():
        if 0 in value.shape:
            raise InputError("data.source", _described(name, value), "holds no values; leave the column out.")


def _described(name: str, value: Any) -> str:
    return f"column {name!r}: {value.dtype.name}[{','.join(map(str, value.shape))}] an example"


def _convert(label: Any) -> str:
    """What makes classes of labels of this shape."""
    if label.shape == ():
        return "convert them"
    return "drop the last axis (labels[:, 0])" if label.shape == (1,) else "take labels.argmax(-1) of one-hot rows"


def _labels(source: Source) -> np.ndarray | None:
    base, indices = (source.source, source.indices) if isinstance(source, Subset) else (source, None)
    if isinstance(base, ArraySource):
        labels = base.arrays.get("label")
        return labels if labels is None or indices is None else labels[indices]
    return read_rows(source, np.arange(min(len(source), LABELS_CHECKED))).get("label")


def require_repeatable(source: Source, indices: Int64[np.ndarray, " n"]) -> None:
    """Check that reading examples again gives the same ones.

    A record that is another one at every reading has no fixed contribution for resumes and processes to agree on.

    Raises:
        InputError: an example differs from its first reading; the cause, a `BadRecordError`, says which.
    """
    first, again = read_rows(source, indices), read_rows(source, indices)
    for position, index in enumerate(indices.tolist()):
        before, after = ({name: rows[name][position].tobytes() for name in rows} for rows in (first, again))
        if before != after:
            raise InputError(
                "data.source",
                "an example",
                "is another one when it is read again; return the record itself, and randomise it in a model with "
                "randomised=True, by the example's `key`.",
            ) from BadRecordError(f"example {index} of those that were read twice")


def fingerprint(source: Source | None) -> bytes:
    """Return the SHA-256 of a source, so that processes and resumed runs can check that they read the same data.

    It covers the length, the columns' names, dtypes and row shapes, and the content: all of an `ArraySource` of up to
    256 MiB, 4,096 evenly spaced examples of a larger one, and 64 of any other source. How the values are stored (byte
    order, gzip, memory map, order of columns) does not matter. No source has one, too.

    Anyone who has a hash of private data can test a guess of that data. Key it with the run's secret before it is
    stored or sent anywhere.

    Raises:
        InputError: as `require_repeatable`.
    """
    if source is None:
        return hashlib.sha256(b"none").digest()
    first = read_rows(source, np.zeros(1, np.int64))
    digest = hashlib.sha256(json.dumps([len(source), schema(first)]).encode())
    indices = _hashed(source, sum(rows.nbytes for rows in first.values()))
    require_repeatable(source, indices[:: -(-len(indices) // READ_TWICE)])
    for start in range(0, len(indices), BLOCK):
        rows = read_rows(source, indices[start : start + BLOCK])
        for name in sorted(rows):
            digest.update(np.ascontiguousarray(rows[name]).data)
    return digest.digest()


def _hashed(source: Source, example_bytes: int) -> Int64[np.ndarray, " n"]:
    """Return the indices whose content is hashed: all, or evenly spaced ones from the first to the last."""
    length = len(source)
    if not isinstance(source.source if isinstance(source, Subset) else source, ArraySource):
        count = min(length, HASHED_ITEMS)
    elif length * example_bytes > HASHED_WHOLE:
        count = min(length, HASHED_ROWS)
    else:
        count = length
    return np.arange(count) * (length - 1) // max(count - 1, 1)
