"""Data of one's own, as it is: a source out of a `datasets.Dataset`, a data frame, an Arrow table, arrays, or items.

Which it is, its type says, not its methods: `take` of several of these is not ours. Their libraries are looked up among
those that are loaded already, since an object of theirs cannot come without them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpdist.data import arrow, hf
from dpdist.data.columns import pick, wanted
from dpdist.data.sources import ArraySource, BadRecordError, Source
from dpdist.data.table import Column, Reading, Table, Unusable, of_cells, to_source
from dpdist.data.table import given as public_names
from dpdist.errors import InputError

#: What a set of examples may be, in words.
WHAT = (
    "a datasets.Dataset, a pandas DataFrame, a pyarrow.Table, a dict of arrays, or an object with __len__ and "
    "__getitem__(index) that returns a dict"
)


def as_source(
    given: Any, columns: Mapping[str, Any] | None, names: tuple[str, ...] | None, where: str, unit: str | None = None
) -> Source:
    """The examples of an object.

    Args:
        given: one of the above.
        columns: `data.columns`.
        names: the public names of the classes, where labels may be text.
        where: what it is, for errors.
        unit: `data.unit`.

    Raises:
        InputError: it is something else, or has columns that no model can take.
    """
    reading = Reading(classes=names, unit=unit, given=public_names(columns, unit))
    if _is(given, "datasets", "Dataset") and given.format["type"] != "custom":  # with a transform, that gives examples
        return to_source(hf.columns_of(given, wanted(columns)), columns, reading, where)
    if _is(given, "pyarrow", "Table"):
        return to_source(arrow.columns_of(given), columns, reading, where)
    if _is(given, "pandas", "DataFrame"):
        return to_source(_frame(given, where), columns, reading, where)
    if isinstance(given, Mapping) and given and all(hasattr(values, "__array__") for values in given.values()):
        return pick(ArraySource({name: np.asarray(values) for name, values in given.items()}, where), columns, where)
    if isinstance(given, Mapping | str) or not isinstance(given, Source):
        raise InputError(where, type(given).__name__, f"is no set of examples; give {WHAT}.")
    if len(given) == 0:
        raise InputError(where, "0 examples", "at least one is needed.")
    return pick(given, columns, where)


def splits(given: Any) -> dict[str, Any] | None:
    """The parts of a `datasets.DatasetDict` by name; None for anything else."""
    return dict(given) if _is(given, "datasets", "DatasetDict") else None


def class_names(given: Any, columns: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The names of the classes that a `datasets.Dataset` declares for its label column."""
    if not _is(given, "datasets", "Dataset"):
        return None
    feature = (given.features or {}).get("label" if columns is None else columns.get("label", ""))
    names = getattr(feature, "names", None)
    return tuple(map(str, names)) if names else None


def _is(given: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(given, kind)


def _frame(frame: Any, where: str) -> Table:
    """The columns of a data frame; its index is none of them."""
    if not all(isinstance(name, str) for name in frame.columns) or not frame.columns.is_unique:
        found = f"{len(frame.columns)} columns"
        raise InputError(where, found, "name the columns of the data frame by text, each once.") from BadRecordError(
            f"they are {list(frame.columns)}"
        )
    return {name: _series(frame[name]) for name in frame.columns}


def _series(series: Any) -> Column:
    values = series.to_numpy()
    if values.dtype.kind in "biuf":
        return values
    column = of_cells(list(values))
    if isinstance(column, Unusable):
        return Unusable(
            f"{series.dtype} with missing values" if series.isna().any() else f"{series.dtype}, {column.what}"
        )
    return column
