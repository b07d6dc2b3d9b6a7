"""Random access to examples by index: the protocol, arrays as a source, views, and reading many at once.

The protocol is grain's `RandomAccessDataSource`, so grain's sources and transformations fit. A Poisson
sample is a sorted list of indices, so nothing else is needed: no shards, no shuffling, no iterators.
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
    """Examples by index, 0 to `len(self) - 1`; each is one record, the unit of the privacy guarantee.

    An example is a dict of arrays and numbers, such as `{"image": uint8[28, 28, 1], "label": int32}`, with
    the same columns, dtypes and shapes for every index. `__getitem__` is called from several threads, and
    returns the same example for the same index each time, in every process.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class TakeSource(Source, Protocol):
    """A source that reads many examples in one call."""

    def take(self, indices: Int64[np.ndarray, " n"], /) -> Rows: ...


def schema(columns: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Dtype and shape of every column, `{"image": "uint8[8,8,1]", "label": "int32[]"}`, sorted by name.

    Raises:
        InputError: a column holds neither numbers nor bools, so no device could take it.
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
    """One array a column, in memory or memory-mapped, rows aligned by index.

    Rows come out in this machine's byte order and never share memory with the columns.

    Args:
        arrays: column name to array[N, ...]; nothing is copied.
        name: what an error calls these columns, e.g. `train columns of /data/mnist`.

    Raises:
        InputError: no columns, columns of differing lengths, or one that does not hold numbers or bools.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays") -> None:
        # A plain-array view of a memmap reads the same pages, and its rows come out as plain arrays.
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
        """Rows at `indices`, in their order; sorted indices read a memory-mapped file front to back."""
        return {name: _native(values.take(indices, axis=0)) for name, values in self.arrays.items()}


class Subset:
    """The examples of `source` at `indices`, renumbered from 0.

    Args:
        source: what is looked at.
        indices: strictly increasing, so that no record is in twice: the guarantee covers one occurrence.

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
        if isinstance(source, Subset):  # so that views never nest
            indices = source.indices[indices]
            source = source.source
        self.source: Source = source
        self.indices: Int64[np.ndarray, " n"] = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[int(self.indices[index])]

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """Rows at `indices` of this view, in their order."""
        return read_rows(self, indices)


def read_rows(source: Source, indices: Int64[np.ndarray, " n"], pool: Executor | None = None) -> Rows:
    """The examples at `indices`, stacked: `{"image": uint8[n, 28, 28, 1], "label": int32[n]}`.

    Args:
        source: read by `take` where it has one, else one example at a time.
        indices: any order; the rows come out in it. None at all gives columns of length 0.
        pool: threads that call `__getitem__`; without one the calling thread does.

    Raises:
        InputError: an example is not a dict of arrays, or two differ in columns, dtypes or shapes.
    """
    if isinstance(source, Subset):  # before `take`, which would leave the pool unused
        return read_rows(source.source, source.indices[indices], pool)
    if isinstance(source, TakeSource):
        return source.take(indices)
    if len(indices) == 0:  # a Poisson sample may be empty; example 0 lends its shapes, not its content
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
    """`array` in this machine's byte order: files may hold the other, and JAX refuses it."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
