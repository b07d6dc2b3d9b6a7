"""Columns of a table, as files or data frames hold them, and how they become a source.

Numbers become arrays; text becomes class numbers by a public list, or is decoded later; images are decoded when an
example is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from dpdist.config.nearest import did_you_mean
from dpdist.data.columns import named, stacked, wanted
from dpdist.data.encoded import EncodedSource
from dpdist.data.images import Images
from dpdist.data.sources import WHERE_NAMED, ArraySource, BadRecordError, Source
from dpdist.errors import InputError


@dataclass(frozen=True)
class Texts:
    """A column of texts (str); None is a missing one."""

    values: Sequence[Any]


@dataclass(frozen=True)
class Classes:
    """A column of class numbers whose names the file's schema gives, such as `ClassLabel` of `datasets`."""

    numbers: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """A column of encoded images: how to read one, how many there are, and where one is stored, for private logs."""

    read: Callable[[int], bytes]
    length: int
    name: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Unusable:
    """A column that no model can take, and what it holds."""

    what: str


Column = np.ndarray | Texts | Classes | Pictures | Unusable
Table = dict[str, Column]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the columns of a table are read; the fields are `data.options` of the sources that read tables."""

    #: Of images, as `dpdist.data.images.Images` takes them.
    size: Any = None
    mode: str = "rgb"
    #: The public list of class names; their places are the class numbers. None takes integers.
    classes: Any = None
    #: `data.unit`: a column of names is numbered.
    unit: str | None = None
    #: Names of columns that the config gives, or this program: errors show no other.
    given: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names = self.classes
        if names is None:
            return
        texts = isinstance(names, list | tuple) and all(isinstance(name, str | int | bool) for name in names)
        if not texts or len(names) < 2 or len(set(map(str, names))) < len(names):
            raise InputError(
                "data.options.classes", names, "list the names of the classes, each once: [ham, spam]; they are public."
            )

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return None if self.classes is None else tuple(map(str, self.classes))


def given(columns: Mapping[str, Any] | None, unit: str | None) -> tuple[Any, ...]:
    """The names of columns that a config gives by `data.columns` and `data.unit`, and those that this program has."""
    return (*(wanted(columns) or ()), *((unit,) if unit is not None else ()), "text", "label", "target")


def to_source(table: Table, columns: Mapping[str, Any] | None, reading: Reading, where: str) -> Source:
    """The examples of a table.

    Args:
        columns: `data.columns`; None keeps all columns under their own names.
        where: what the table is, for errors.

    Raises:
        InputError: a column is missing, or holds what no model can take.
    """
    if reading.unit is not None and reading.unit not in {*table, *(columns or {})}:
        meant = did_you_mean(reading.unit, list(table))
        raise InputError(
            "data.unit", reading.unit, f"there is no such column in {where}, which has {len(table)}; {WHERE_NAMED}."
        ) from BadRecordError(f"{meant}there are {', '.join(table)}")
    chosen = named(columns, table, where, reading.given)
    arrays: dict[str, np.ndarray] = {}
    pictures = []
    for ours, theirs in chosen.items():
        if isinstance(theirs, list):
            arrays[ours] = stacked([numbers(name, table, reading, where) for name in theirs], ours, theirs)
        elif isinstance(column := table[theirs], Pictures):
            pictures.append(_images(ours, theirs, column, reading))
        elif ours == reading.unit:
            arrays[ours] = numbered(column, theirs, where)
        else:
            arrays[ours] = numbers(theirs, table, reading, where, label=ours == "label")
    return EncodedSource(arrays, pictures) if pictures else ArraySource(arrays, name=where)


def names_of_classes(table: Table, columns: Mapping[str, Any] | None, reading: Reading) -> tuple[str, ...] | None:
    """The public names of the classes: `data.options.classes`, else those of the label column's schema."""
    label = table.get("label" if columns is None else columns.get("label", ""))
    return reading.label_names or (label.names if isinstance(label, Classes) else None)


def of_texts(cells: Sequence[str]) -> Column:
    """A column of cells that a file holds as text: numbers where every cell is one, else text."""
    for dtype in (np.int64, np.float64):
        try:
            return np.array(cells, dtype=str).astype(dtype)
        except (ValueError, OverflowError):
            continue
    filled = [cell for cell in cells if cell.strip()]
    if len(filled) < len(cells) and all(map(is_number, filled)):
        return Unusable("numbers, with empty cells")
    return Texts(cells)


def is_number(text: str) -> bool:
    """Whether a cell is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def of_cells(cells: Sequence[Any]) -> Column:
    """A column of Python objects: texts, or numbers and arrays of one shape."""
    if cells and all(isinstance(cell, str) for cell in cells):
        return Texts(cells)
    if any(cell is None for cell in cells):
        return Unusable("missing values")
    try:
        stacked = np.stack([np.asarray(cell) for cell in cells])
    except ValueError:
        return Unusable("cells of differing shapes")
    return stacked if stacked.dtype.kind in "biuf" else Unusable("cells that are no numbers")


def _images(ours: str, theirs: str, column: Pictures, reading: Reading) -> Images:
    return Images(
        column.read,
        column.length,
        name=column.name or (lambda index: f"column {theirs}"),
        column=ours,
        size=reading.size,
        mode=reading.mode,
    )


def numbers(name: str, table: Table, reading: Reading, where: str, *, label: bool = False) -> np.ndarray:
    """A column as an array[N, ...].

    Args:
        name: theirs; an error gives its place where the config has not named it.
        where: what the table is, for errors.
        label: whether it is the label, whose texts are the names of classes.

    Raises:
        InputError: it holds something else, or missing values.
    """
    column = table[name]
    shown = f"column {repr(name) if name in reading.given else f'{list(table).index(name) + 1} of {len(table)}'}"
    field, private = f"{shown} of {where}", BadRecordError(f"column {name!r}")
    if label and reading.label_names is not None and (names := _names_in(column, reading.label_names)) is not None:
        return _class_numbers(names, reading.label_names)
    if isinstance(column, Classes):
        return column.numbers
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "f" and np.isnan(column).any():
            raise InputError(field, "numbers, some of them missing (NaN)", _CHOOSE) from private
        return column
    if isinstance(column, Texts) and label:
        raise InputError(
            field,
            "text",
            "the names of the classes are public constants, never taken from the data: list them in "
            "data.options.classes, such as [ham, spam].",
        ) from private
    what = {Texts: "text", Pictures: "images"}.get(type(column))
    raise InputError(field, what or column.what, _CHOOSE) from private  # type: ignore[union-attr]


def numbered(column: Column, name: str, where: str) -> np.ndarray:
    """Whose each record is, by a hash of the name or number: uint32[N, 2], as columns have 32 bits at most.

    The name `7` and the number 7 have one hash, as a file with names beside numbers gives both as text, and another
    file numbers alone.

    Raises:
        InputError: it holds something else than names and integers, or a name is missing.
    """
    if isinstance(column, Texts) and all(value is not None and str(value).strip() for value in column.values):
        values = [str(value) for value in column.values]
    elif isinstance(column, Classes):
        values = [str(value) for value in column.numbers.tolist()]
    elif isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "iu":
        values = [str(value) for value in column.tolist()]
    else:
        what = "names, some of them missing" if isinstance(column, Texts) else "something else"
        if isinstance(column, np.ndarray):
            what = f"{column.dtype.name}{list(column.shape[1:])}"
        raise InputError("data.unit", name, f"of {where} must hold a name or an integer for each record, not {what}.")
    number = {value: blake2b(value.encode(), digest_size=8).digest() for value in set(values)}
    return np.frombuffer(b"".join(number[value] for value in values), "<u4").reshape(-1, 2).astype(np.uint32)


def _names_in(column: Column, known: tuple[str, ...]) -> Sequence[Any] | None:
    """The class names in a label column; None where it holds the places of these names."""
    if isinstance(column, Texts):
        return column.values
    if isinstance(column, Classes):
        return [column.names[number] for number in column.numbers]
    whole = isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "iub"
    numbers_are_names = all(name.removeprefix("-").isdigit() for name in known)
    if whole and (numbers_are_names or column.dtype.kind == "b"):  # type: ignore[union-attr]
        return [str(value) for value in column.tolist()]  # type: ignore[union-attr]
    return None


_CHOOSE = (
    "a model takes whole columns of numbers, images, or a label; name the columns to use in data.columns, such as "
    "{image: image, label: label}, and the rest is left out."
)


def _class_numbers(values: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    number = {name: index for index, name in enumerate(names)}
    found = np.array([number.get(value, -1) if value is not None else -1 for value in values], np.int32)
    if (wrong := np.flatnonzero(found < 0)).size:
        raise InputError(
            "data.options.classes",
            list(names),
            "some labels are none of these; list all classes, spelt as in the data.",
        ) from BadRecordError(f"{wrong.size} labels, the first {values[int(wrong[0])]!r}, of row {wrong[0]}")
    return found
