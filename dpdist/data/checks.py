"""Checks of the data before the first step: labels in range, and the same data on all processes and on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from dpdist.data.encoded import EncodedSource
from dpdist.data.sources import ArraySource, BadRecordError, Source, Subset, read_rows, schema
from dpdist.data.units import UnitSource, WithoutColumn
from dpdist.errors import InputError

#: Number of examples looked at if each costs a call of the user's code, and rows of an array at a time otherwise.
LOOKED_AT, BLOCK_CHECKED = 16, 1 << 16
#: An array source of up to HASHED_WHOLE bytes is hashed whole; of a larger one, HASHED_ROWS examples are hashed.
HASHED_WHOLE, HASHED_ROWS = 256 << 20, 4096
#: Number of examples hashed if each costs a call of the user's code.
HASHED_ITEMS = 64
#: Number of examples read again, to see that they stay the same.
READ_TWICE = 16
_FIRST = np.zeros(1, np.int64)
#: Examples held in memory at once while hashing; part of the digest's definition.
BLOCK = 256


def require_below(source: Source, column: str, bound: int, *, field: str, value: Any, remedy: str) -> None:
    """Check that the integers of a column lie in `[0, bound)`.

    JAX would not complain: it clamps an index out of range or returns NaN, so training would silently go wrong. All
    rows held in memory are checked; of any other source only the first 16, because each example may cost a read
    and a decode.

    Args:
        source: examples whose `column` holds integers or bools of any shape.
        bound: a public constant.
        field: the setting to blame in the error, with its value, and what to do.

    Raises:
        InputError: one is out of range; the error does not say which, because they are private; its cause, a
            `BadRecordError`, does.
    """
    for start, values in _blocks(source, column):
        if values.size and (values.min() < 0 or values.max() >= bound):
            wrong = np.argwhere((values < 0) | (values >= bound))
            raise InputError(
                field, value, f"some values of {column!r} lie outside 0 to {bound - 1}; {remedy}"
            ) from BadRecordError(f"{values[tuple(wrong[0])]}, of example {start + wrong[0][0]}")


def require_same_columns(train: Source, test: Source | None, name: str) -> None:
    """Check that train and test examples have the same columns, of the same shapes and dtypes.

    A model sees both in the same way: uint8 pixels in one and floats from 0 to 1 in the other would only show as a poor
    accuracy.

    Args:
        name: of the dataset, for the error.

    Raises:
        InputError: they differ; it names both.
    """
    if test is None:
        return
    first, second = (
        schema({column: np.asarray(rows[0]) for column, rows in read_rows(each, _FIRST).items()})
        for each in (train, test)
    )
    if first != second:
        raise InputError(
            f"test columns of {name}",
            second,
            f"the train columns are {first}; both need the same names, shapes and dtypes.",
        )


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


def _blocks(source: Source, column: str) -> Iterator[tuple[int, np.ndarray]]:
    """What can be looked at of a column: the number of the first row, and rows."""
    source = source.source if isinstance(source, WithoutColumn) else source
    base, indices = (source.source, source.indices) if isinstance(source, Subset) else (source, None)
    if not isinstance(base, ArraySource | EncodedSource) or column not in base.arrays:
        yield 0, read_rows(source, np.arange(min(len(source), LOOKED_AT)))[column]
        return
    values = base.arrays[column]
    for start in range(0, len(source), BLOCK_CHECKED):
        rows = slice(start, min(start + BLOCK_CHECKED, len(source)))
        yield start, values[rows] if indices is None else values[indices[rows]]


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
    order, gzip, memory map, order of columns) does not matter. Of images and documents, which are decoded when they are
    read, it also covers the columns in memory and the stored bytes, by the same rule as for an `ArraySource`. No source
    has one, too.

    Anyone who has a hash of private data can test a guess of that data. Key it with the run's secret before it is
    stored or sent anywhere.

    Raises:
        InputError: as `require_repeatable`.
    """
    if source is None:
        return hashlib.sha256(b"none").digest()
    if isinstance(source, WithoutColumn):
        return hashlib.sha256(fingerprint(source.source) + source.column.encode()).digest()
    if isinstance(source, UnitSource):
        return hashlib.sha256(fingerprint(source.source) + source.digest() + b"%d" % source.records).digest()
    first = read_rows(source, np.zeros(1, np.int64))
    digest = hashlib.sha256(json.dumps([len(source), schema(first)]).encode())
    indices = _hashed(source, sum(rows.nbytes for rows in first.values()))
    require_repeatable(source, indices[:: -(-len(indices) // READ_TWICE)])
    for start in range(0, len(indices), BLOCK):
        rows = read_rows(source, indices[start : start + BLOCK])
        for name in sorted(rows):
            digest.update(np.ascontiguousarray(rows[name]).data)
    base, places = (source.source, source.indices) if isinstance(source, Subset) else (source, np.arange(len(source)))
    if isinstance(base, EncodedSource):
        _update_stored(digest, base, places)
    return digest.digest()


def fingerprint_of_what_stays(train: Source, test: Source | None) -> bytes:
    """The SHA-256 of what a run may not change: the test examples, and whose the training records are, where that is
    the unit of its guarantee. Key it, as that of `fingerprint`.
    """
    tested = fingerprint(test)
    return tested if not isinstance(train, UnitSource) else hashlib.sha256(tested + train.digest()).digest()


def fingerprints(train: Source, test: Source | None) -> dict[str, bytes]:
    """The fingerprints of a dataset's parts, by the names that error messages use. Key them, as each.

    Raises:
        InputError: both parts are the same records, whose accuracy would then be published exactly.
    """
    found = {"training data": fingerprint(train), "test data": fingerprint_of_what_stays(train, test)}
    if found["training data"] == found["test data"]:
        raise InputError(
            "data.source",
            "the test part",
            "holds the training records themselves, and what is measured on test records is published as it is; hold "
            "some records out, or leave the test part out.",
        )
    return found


def _update_stored(digest: Any, source: EncodedSource, places: Int64[np.ndarray, " n"]) -> None:
    """Hash what an encoded source holds at `places`: arrays whole, and records as they are stored."""
    for name in sorted(source.arrays):
        digest.update(np.ascontiguousarray(source.arrays[name][places]).data)
    for records in source.encoded:
        digest.update(records.identity.encode())
    some = places[_spaced(len(places), HASHED_ITEMS)]
    mean = sum(len(source.stored(index)) for index in some.tolist()) / len(some)
    count = HASHED_ROWS if mean * len(places) > HASHED_WHOLE else len(places)
    for index in places[_spaced(len(places), count)].tolist():
        stored = source.stored(index)
        digest.update(len(stored).to_bytes(8, "little") + stored)


def _hashed(source: Source, example_bytes: int) -> Int64[np.ndarray, " n"]:
    """Return the indices whose content is hashed: all, or evenly spaced ones from the first to the last."""
    length = len(source)
    if not isinstance(source.source if isinstance(source, Subset) else source, ArraySource):
        count = HASHED_ITEMS
    elif length * example_bytes > HASHED_WHOLE:
        count = HASHED_ROWS
    else:
        count = length
    return _spaced(length, count)


def _spaced(length: int, count: int) -> Int64[np.ndarray, " n"]:
    """At most `count` of `length` indices, evenly spaced from the first to the last."""
    count = min(length, count)
    return np.arange(count) * (length - 1) // max(count - 1, 1)
