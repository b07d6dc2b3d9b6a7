"""Sources, which give examples by index: the protocol, array columns, subsets, and reading many rows at once.

The protocol is grain's `RandomAccessDataSource`, so grain's sources and transformations work here. A Poisson sample is
a sorted list of indices, so we need no shards, no shuffling and no iterators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Shaped

from dpdist.errors import InputError

#: Examples by column, stacked along a first axis.
Rows = dict[str, Shaped[np.ndarray, "n ..."]]
#: The widest dtype of each kind that goes to a device. JAX would convert wider ones without a word, and wrap integers.
WIDEST = {"i": np.dtype(np.int32), "u": np.dtype(np.uint32), "f": np.dtype(np.float32), "c": np.dtype(np.complex64)}
#: Values of a wide column that are looked at in one go.
_BLOCK = 1 << 20


class BadRecordError(ValueError):
    """Which record is wrong, and how, or names that are the data's: of files, which may be a person's, and of columns,
    which are a record where a file has no line of names.

    It is the cause of an `InputError` whose own text says neither, since that text is shown where everyone may read it.
    """


#: Where the names are that an error leaves out.
WHERE_NAMED = "`dpdist data describe CONFIG` says which"


@runtime_checkable
class Source(Protocol):
    """Examples by index from 0 to `len(self) - 1`; each is one record, the unit of the privacy guarantee.

    An example is a dict of arrays and numbers, such as `{"image": uint8[28, 28, 1], "label": int32}`, with the same
    columns, dtypes and shapes at every index. `__getitem__` must be thread-safe, and must return the same example for
    the same index at every call and in every process (checked on some): to augment examples, randomise the model.
    Numbers of 64 bits go to the devices in 32: integers that do not fit, and floats that would become infinite, are
    refused.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class TakeSource(ABC):
    """A source that reads many examples in one call; a source of your own derives from it to say so.

    The method's name alone would not: `take` of `datasets.Dataset` or of a pandas `DataFrame` does something else.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    @abstractmethod
    def take(self, indices: Int64[np.ndarray, " n"], /) -> Rows:
        """Return the examples at `indices`, in their order."""


@runtime_checkable
class PoolSource(Source, Protocol):
    """A source made of others, which it reads with the threads of its caller."""

    def take_with(self, indices: Int64[np.ndarray, " n"], pool: Executor | None, /) -> Rows:
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


class ArraySource(TakeSource):
    """A source with one array per column, in memory or memory-mapped; row i of all columns is example i.

    It returns rows in this machine's byte order, in memory of their own.

    Args:
        arrays: array[N, ...] by column name; nothing is copied.
        name: the name of these columns in errors, such as `train columns of /data/mnist`.

    Raises:
        InputError: there are no columns, they differ in length, or one does not hold numbers or bools, or holds some
            that do not fit into 32 bits.
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
        for column, values in self.arrays.items():
            if _is_wide(values.dtype):
                rows = max(1, _BLOCK * self._length // max(1, values.size))
                for start in range(0, self._length, rows):
                    block = np.arange(start, min(start + rows, self._length))
                    for_devices(f"{column!r} of {name}", values[start : start + rows], block)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: rows[0] for name, rows in self.take(np.array([index], np.int64)).items()}

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """Return the rows at `indices`, in their order; sorted indices read a memory-mapped file front to back."""
        return {name: _native(values.take(indices, axis=0)) for name, values in self.arrays.items()}


class Subset(TakeSource):
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
        source: read with `take` if it is a `TakeSource`, else one example at a time.
        indices: in any order, which the rows keep. If empty, the columns have length 0.
        pool: threads that call `__getitem__`; None calls it on this thread.

    Raises:
        InputError: an example is not a dict of arrays, two differ in columns, dtypes or shapes, or a value does not
            fit into 32 bits. The error does not say which; its cause, a `BadRecordError`, does.
    """
    if isinstance(source, Subset):  # not by its `take`, which would not use the pool
        return read_rows(source.source, source.indices[indices], pool)
    if isinstance(source, PoolSource):
        rows = source.take_with(indices, pool)
    elif isinstance(source, TakeSource):
        rows = source.take(indices)
    elif len(indices) == 0:  # an empty Poisson sample: only example 0's shapes are used
        return {name: rows[:0] for name, rows in read_rows(source, np.array([0], np.int64)).items()}
    else:
        rows = _stack(source, indices, pool)
    return {name: for_devices(repr(name), values, indices) for name, values in rows.items()}


def _stack(source: Source, indices: Int64[np.ndarray, " n"], pool: Executor | None) -> Rows:
    read = pool.map if pool else map
    examples = [
        _columns(example, index)
        for index, example in zip(indices.tolist(), read(source.__getitem__, indices.tolist()), strict=True)
    ]
    require_one_schema(examples, indices.tolist())
    return {name: np.stack([_native(example[name]) for example in examples]) for name in examples[0]}


def require_one_schema(examples: Sequence[Mapping[str, np.ndarray]], indices: Sequence[int]) -> None:
    """Check that examples have the same columns, dtypes and shapes.

    Raises:
        InputError: one differs from the first; the cause, a `BadRecordError`, says which.
    """
    expected = schema(examples[0])
    for index, example in zip(indices, examples, strict=True):
        if (found := schema(example)) != expected:
            raise InputError(
                "data.source",
                "examples that differ",
                "return the same columns, dtypes and shapes for every index.",
            ) from BadRecordError(f"example {index} is {found}, and example {indices[0]} is {expected}")


def _columns(example: Any, index: int) -> dict[str, np.ndarray]:
    if not isinstance(example, Mapping):
        raise InputError(
            "data.source",
            "an example that is no dict",
            "return a dict of arrays from __getitem__, such as {'image': ..., 'label': ...}.",
        ) from BadRecordError(f"example {index} is a {type(example).__name__}")
    try:
        columns = {name: np.asarray(value) for name, value in example.items()}
        schema(columns)
    except ValueError as error:
        raise InputError(
            "data.source",
            "an example with something else than numbers and bools",
            "return arrays of them; encode text and objects as integers first.",
        ) from BadRecordError(f"example {index}, of {sorted(map(str, example))}: {error}")
    return columns


def for_devices(
    column: str, values: Shaped[np.ndarray, "n ..."], indices: Int64[np.ndarray, " n"] | None = None
) -> Shaped[np.ndarray, "n ..."]:
    """`values` in a dtype that devices have: those of 64 bits in 32, floats rounded.

    Args:
        column: what the error calls them.
        indices: of the examples, for the error's cause.

    Raises:
        InputError: an integer does not fit, or a finite float would become infinite.
    """
    values = np.asarray(values)
    if not _is_wide(values.dtype):
        return values
    with np.errstate(over="ignore"):
        narrow = values.astype(WIDEST[values.dtype.kind])
    lost = narrow != values if values.dtype.kind in "iu" else np.isinf(narrow) & ~np.isinf(values)
    if lost.any():
        place = int(np.argwhere(lost)[0][0])
        index = place if indices is None else int(indices[place])
        raise InputError(
            f"column {column}",
            values.dtype.name,
            f"some values do not fit into {narrow.dtype.name}, the widest that devices compute with; scale them down, "
            "or number them from 0.",
        ) from BadRecordError(f"of example {index}: {values[lost][0]}")
    return narrow


def _is_wide(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in WIDEST and dtype.itemsize > WIDEST[dtype.kind].itemsize


def _native(array: np.ndarray) -> np.ndarray:
    """Return `array` in this machine's byte order: files may use the other one, which JAX rejects."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
