"""`data.columns`: which columns of a dataset an example has, and under which names.

`{image: pixel_values, label: fine_label}` takes these two of theirs and calls them ours; the others are left out. A
list of theirs, such as `{features: [age, height]}`, is stacked into one float32 column. None keeps all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dpdist.config.nearest import did_you_mean
from dpdist.data.encoded import EncodedSource
from dpdist.data.sources import WHERE_NAMED, ArraySource, BadRecordError, Source, Subset, for_devices
from dpdist.errors import InputError


def named(
    columns: Mapping[str, Any] | None, there: Collection[Any], where: str, given: Collection[Any] | None = None
) -> dict[str, Any]:
    """Theirs by ours, all of them known.

    Args:
        columns: `data.columns`.
        there: the names of the columns that there are.
        where: what has them, for errors.
        given: the names that everyone may read; None is all of `columns`.

    Raises:
        InputError: there is no such column; the error's cause lists those there are.
    """
    if columns is None:
        return {name: name for name in there}
    for ours, theirs in columns.items():
        for place, name in enumerate(theirs if isinstance(theirs, list) else [theirs], start=1):
            if name not in there:
                meant = did_you_mean(name, [each for each in there if isinstance(each, str)])
                raise InputError(
                    f"data.columns.{ours}",
                    name if given is None or name in given else f"column {place}",
                    f"no such column in {where}, which has {len(there)}; {WHERE_NAMED}.",
                ) from BadRecordError(f"{name!r}: {meant}there are {', '.join(map(str, there))}")
    return dict(columns)


def wanted(columns: Mapping[str, Any] | None) -> list[Any] | None:
    """Theirs, in one list; None where all are kept."""
    if columns is None:
        return None
    return [name for theirs in columns.values() for name in (theirs if isinstance(theirs, list) else [theirs])]


def stacked(parts: Sequence[Any], ours: str, theirs: Sequence[str]) -> np.ndarray:
    """Columns of numbers [n] as one float32[n, columns]; numbers of one example as float32[columns].

    Raises:
        InputError: the columns hold more than a number an example.
    """
    arrays = [
        for_devices(f"{place} of data.columns.{ours}", np.asarray(part)).astype(np.float32)
        for place, part in enumerate(parts, start=1)
    ]
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim > 1:
        shapes = [list(array.shape[1:]) for array in arrays]
        raise InputError(
            f"data.columns.{ours}",
            f"{len(arrays)} columns",
            f"stack columns of one number each; these have the shapes {', '.join(map(str, shapes))}.",
        ) from BadRecordError(f"of {', '.join(map(str, theirs))}")
    return np.stack(arrays, axis=-1)


def pick(source: Source, columns: Mapping[str, Any] | None, where: str) -> Source:
    """`source` with the columns that `data.columns` names.

    Raises:
        InputError: there is no such column, or columns that hold more than a number each are to be stacked.
    """
    if columns is None:
        return source
    if isinstance(source, Subset):
        return Subset(pick(source.source, columns, where), source.indices)
    if isinstance(source, ArraySource):
        return ArraySource(_picked(source.arrays, named(columns, source.arrays, where)), name=where)
    first = source[0]
    there = first if isinstance(first, Mapping) else range(len(first)) if isinstance(first, list | tuple) else ()
    chosen = named(columns, list(there), where)
    return PickedEncoded(source, chosen) if isinstance(source, EncodedSource) else Picked(source, chosen)


def _picked(example: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {
        ours: stacked([example[name] for name in theirs], ours, theirs) if isinstance(theirs, list) else example[theirs]
        for ours, theirs in columns.items()
    }


class Picked:
    """Examples with some columns of `source`, under other names; an example there may also be a tuple.

    Args:
        columns: theirs by ours; places in the tuple are theirs, too.
    """

    def __init__(self, source: Source, columns: Mapping[str, Any]) -> None:
        self.source, self.columns = source, columns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        try:
            return _picked(example, self.columns)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                "data.columns", dict(self.columns), "an example lacks one of these; return all of them for every index."
            ) from BadRecordError(f"example {index}: {type(error).__name__} {error}")


class PickedEncoded(EncodedSource):
    """Some columns of an `EncodedSource`, under other names."""

    def __init__(self, source: EncodedSource, columns: Mapping[str, Any]) -> None:
        held = {ours: name for ours, name in columns.items() if isinstance(name, str) and name in source.arrays}
        super().__init__({ours: source.arrays[name] for ours, name in held.items()}, source.encoded)
        self._source, self._columns = source, columns

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _picked(self._source[index], self._columns)
