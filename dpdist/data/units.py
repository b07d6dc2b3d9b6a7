"""Everybody's records as one example, so that the guarantee is for a person, a household or a hospital, not a record.

Sampling, clipping and accounting then have the unit for their record, and nothing else about them changes: a unit is in
a step with probability q, and adds at most C to its sum, however many records it has (McMahan et al. 2018, "Learning
Differentially Private Recurrent Language Models", with one local step).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor

import numpy as np
from jaxtyping import Int64, Shaped

from dpdist.data.encoded import EncodedSource
from dpdist.data.sources import WHERE_NAMED, ArraySource, BadRecordError, Rows, Source, Subset, read_rows
from dpdist.errors import InputError

#: The column that says which of a unit's rows are records: bool[records], the others being padding.
MASK = "unit_mask"
#: Records that are read at a time to learn whose they are.
_BLOCK = 4096


class UnitSource:
    """A source whose examples are units: up to `records` records of one, stacked and padded.

    Example u has every column of the records but that of the unit, as [records, ...], and `unit_mask`, bool[records].
    A unit's first records in the order of the source are used. Padding repeats its first record, so that no value is
    there that a model cannot take; the mask keeps it out of the loss.

    Args:
        source: the records.
        column: the name of the column of integers that says whose a record is.
        records: the most that one unit may bring, a public constant.

    Raises:
        InputError: there is no such column, or it does not hold one integer a record.
    """

    def __init__(self, source: Source, column: str, records: int) -> None:
        self.source, self.column, self.records = source, column, records
        first = read_rows(source, np.zeros(1, np.int64))
        if column not in first:
            raise InputError(
                "data.unit", column, f"there is no such column; there are {len(first)}; {WHERE_NAMED}."
            ) from BadRecordError(f"there are {', '.join(sorted(first))}")
        if MASK in first:
            raise InputError("data.source", f"column {MASK!r}", "is the name of a unit's mask; rename it.")
        if first[column].dtype.kind not in "iu" or first[column].shape[1:] not in ((), (2,)):
            found = f"{first[column].dtype.name}{list(first[column].shape[1:])}"
            raise InputError("data.unit", column, f"it must hold one integer a record, not {found}; number the units.")
        self.owner = owners(source, column)
        order = np.argsort(self.owner, kind="stable")
        _, self._start, self._count = np.unique(self.owner[order], return_index=True, return_counts=True)
        self._order = order

    def __len__(self) -> int:
        return len(self._start)

    @property
    def left_out(self) -> int:
        """The number of records that no unit's share has room for. It depends on the data, so it is private."""
        return int(np.maximum(self._count - self.records, 0).sum())

    def __getitem__(self, index: int) -> Rows:
        return {name: rows[0] for name, rows in self.take(np.array([index], np.int64)).items()}

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """The units at `indices`, in their order."""
        return self.take_with(indices, None)

    def take_with(self, indices: Int64[np.ndarray, " n"], pool: Executor | None) -> Rows:
        """As `take`; `pool` reads the records."""
        place = np.arange(self.records)
        mask = place < self._count[indices, None]
        rows = self._order[self._start[indices, None] + np.where(mask, place, 0)]
        found = read_rows(self.source, rows.reshape(-1), pool)
        return {
            name: values.reshape(len(indices), self.records, *values.shape[1:])
            for name, values in found.items()
            if name != self.column
        } | {MASK: mask}

    def without_unit(self) -> WithoutColumn:
        """The records, without the column that says whose they are."""
        return WithoutColumn(self.source, self.column)

    def digest(self) -> bytes:
        """A hash of whose each record is, whatever their share; private."""
        return hashlib.sha256(f"{self.column}\0".encode() + self.owner.astype("<i8").tobytes()).digest()


class WithoutColumn:
    """The examples of a source without one of their columns."""

    def __init__(self, source: Source, column: str) -> None:
        self.source, self.column = source, column

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Rows:
        return {name: rows[0] for name, rows in self.take(np.array([index], np.int64)).items()}

    def take(self, indices: Int64[np.ndarray, " n"]) -> Rows:
        """The rows at `indices`."""
        return self.take_with(indices, None)

    def take_with(self, indices: Int64[np.ndarray, " n"], pool: Executor | None) -> Rows:
        """As `take`; `pool` reads the rows."""
        return {name: rows for name, rows in read_rows(self.source, indices, pool).items() if name != self.column}


def owners(source: Source, column: str) -> Int64[np.ndarray, " n"]:
    """Whose each record is: the integers of the column, or those that two of 32 bits make (`table.numbered`)."""
    values = column_of(source, column)
    if values.ndim == 1:
        return values.astype(np.int64)
    high, low = values.astype(np.uint64).T
    return (high << np.uint64(32) | low).view(np.int64)


def column_of(source: Source, column: str) -> Shaped[np.ndarray, "n ..."]:
    """All of one column; reads the whole source unless it is of arrays."""
    base, indices = (source.source, source.indices) if isinstance(source, Subset) else (source, None)
    if isinstance(base, ArraySource | EncodedSource) and column in base.arrays:
        return base.arrays[column] if indices is None else base.arrays[column][indices]
    starts = range(0, len(source), _BLOCK)
    blocks = [read_rows(source, np.arange(at, min(at + _BLOCK, len(source))))[column] for at in starts]
    return np.concatenate(blocks)


def require_apart(train: UnitSource, test: Source) -> None:
    """Check that no unit has records in both parts: those that are tested on are covered by no guarantee.

    Raises:
        InputError: one has, and its cause says how many; or it cannot be seen, since the test records do not say whose
            they are, or say it in another form.
    """
    first = np.zeros(1, np.int64)
    told = read_rows(test, first).get(train.column)
    if told is None:
        raise InputError(
            "data.unit",
            train.column,
            "the test records have no such column, so that nobody can see whether some are a training unit's, and the "
            "guarantee covers no test record; add it to them.",
        )
    # Names are held as two numbers, so a unit's name in one part and its number in the other would never meet.
    if told.shape != (form := read_rows(train.source, first)[train.column].shape) or told.dtype.kind not in "iu":
        raise InputError(
            "data.unit",
            train.column,
            f"training records hold it as {list(form[1:])} integers each and test records as {told.dtype.name}"
            f"{list(told.shape[1:])}, so that nobody can see whether a unit is in both; read both parts by one kind of "
            "source, or number the units in both.",
        )
    both = np.intersect1d(train.owner, owners(test, train.column))
    if both.size:
        remedy = (
            "some units have training and test records, and the guarantee covers no test record; part them by unit."
        )
        raise InputError("data.unit", train.column, remedy) from BadRecordError(f"{both.size} units, such as {both[0]}")
