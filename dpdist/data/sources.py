"""Sources, which give examples by index: the protocol, array columns, subsets, and reading many rows at once.

The protocol is grain's `RandomAccessDataSource`, so grain's sources and transformations work here. A Poisson sample is
a sorted list of indices, so we need no shards, no shuffling and no iterators.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Shaped

from dpdist.errors import InputError

#: Examples by column, stacked along a first axis.
Rows = dict[str, Shaped[np.ndarray, "n ..."]]


@runtime_checkable
class Source(Protocol):
    """Examples by index from 0 to `len(self) - 1`; each is one record, the unit of the privacy guarantee.

    An example is a dict of arrays and numbers, such as `{"image": uint8[28, 28, 1], "label": int32}`, with the same
    columns, dtypes and shapes at every index. `__getitem__` must be thread-safe, and must return the same example for
    the same index at every call and in every process (checked on some): to augment examples, randomise the model.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class TakeSource(Source, Protocol):
    """A source that reads many examples in one call."""

    def take(self, indices: Int64[np.ndarray, " n"], /) -> Rows:
        """Return the examples at `indices`, in their order."""
        ...


def schema(columns: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return every column's dtype and shape, sorted by name: `{"image": "uint8[8,8,1]", "label": "int32[]"}`.

    Raises:
        InputError: a column holds neither numbers nor bools, so it cannot go to a device.
    """
    for name, column in columns.items():
        if column.dtype.kind not in "biufc":
            raise InputError(
                f"column {name!r}",
                f"dtype {column.dtype}",
                "a column holds numbers or bools; encode text and objects as integers first.",
            )
    return {name: f"{columns[name].dtype.name}[{','.join(map(str, columns[name].shape))}]" for name in sorted(columns)}


class ArraySource:
    """A source with one array per column, in memory or memory-mapped; row i of all columns is example i.

    It returns rows in this machine's byte order, in memory of their own.

    Args:
        arrays: array[N, ...] by column name; nothing is copied.
        name: the name of these columns in errors, such as `train columns of /data/mnist`.

    Raises:
        InputError: there are no columns, they differ in length, or one does not hold numbers or bools.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays") -> None:
        # A plain-array view of a memmap reads the same pages, and indexing it gives plain arrays.
        self.arrays = {column: np.asarray(values) for column, values in arrays.items()}
        shapes = schema(self.arrays)
        if not self.arrays or any(values.ndim == 0 for values in self.arrays.values()):
            raise InputError(name, shapes, "give at least one column, each with one row an example.")
        lengths = {len(values) for values in self.arrays.values()}
        if len(lengths) > 1:
            raise InputError(name, shapes, "the columns differ in length; each needs one row an example.")
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: rows[0] for name, rows in self.take(np.array([index], np.int64)).items()}

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """Return the rows at `indices`, in their order; sorted indices read a memory-mapped file front to back."""
        return {name: _native(values.take(indices, axis=0)) for name, values in self.arrays.items()}


class Subset:
    """A source of the examples of `source` at `indices`, renumbered from 0.

    Args:
        source: the source to take examples from; a Subset of a Subset refers to the first source directly.
        indices: strictly increasing, so that no record occurs twice: the guarantee covers one occurrence.

    Raises:
        InputError: the indices repeat, are out of order, or lie outside the source.
    """

    def __init__(self, source: Source, indices: Int64[np.ndarray, " n"]) -> None:
        if indices.size and (indices[0] < 0 or indices[-1] >= len(source) or np.any(np.diff(indices) <= 0)):
            raise InputError(
                "Subset.indices",
                f"{indices.size} indices",
                "give strictly increasing indices "
                f"from 0 to {len(source) - 1}; a record in twice would get half the protection.",
            )
        if isinstance(source, Subset):  # never nest subsets
            indices = source.indices[indices]
            source = source.source
        self.source: Source = source
        self.indices: Int64[np.ndarray, " n"] = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[int(self.indices[index])]

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """Return the rows at `indices` of this subset, in their order."""
        return read_rows(self, indices)


def read_rows(source: Source, indices: Int64[np.ndarray, " n"], pool: Executor | None = None) -> Rows:
    """Read the examples at `indices` and stack them: `{"image": uint8[n, 28, 28, 1], "label": int32[n]}`.

    Args:
        source: read with `take` if it has one, else one example at a time.
        indices: in any order, which the rows keep. If empty, the columns have length 0.
        pool: threads that call `__getitem__`; None calls it on this thread.

    Raises:
        InputError: an example is not a dict of arrays, or two differ in columns, dtypes or shapes.
    """
    if isinstance(source, Subset):  # not by its `take`, which would not use the pool
        return read_rows(source.source, source.indices[indices], pool)
    if isinstance(source, TakeSource):
        return source.take(indices)
    if len(indices) == 0:  # an empty Poisson sample: only example 0's shapes are used
        return {name: rows[:0] for name, rows in read_rows(source, np.array([0], np.int64)).items()}
    read = pool.map if pool else map
    examples = [
        _columns(example, index)
        for index, example in zip(indices.tolist(), read(source.__getitem__, indices.tolist()), strict=True)
    ]
    expected = schema(examples[0])
    for index, example in zip(indices.tolist(), examples, strict=True):
        if (found := schema(example)) != expected:
            raise InputError(
                f"example {index}",
                found,
                f"differs from example {indices[0]}, {expected}; "
                "return the same columns, dtypes and shapes for every index.",
            )
    return {name: np.stack([_native(example[name]) for example in examples]) for name in examples[0]}


def _columns(example: Any, index: int) -> dict[str, np.ndarray]:
    if not isinstance(example, Mapping):
        raise InputError(
            f"example {index}",
            type(example).__name__,
            "return a dict of arrays from __getitem__, such as {'image': ..., 'label': ...}.",
        )
    try:
        return {name: np.asarray(value) for name, value in example.items()}
    except ValueError as error:
        raise InputError(f"example {index}", sorted(example), f"a column is not an array: {error}") from None


def _native(array: np.ndarray) -> np.ndarray:
    """Return `array` in this machine's byte order: files may use the other one, which JAX rejects."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
