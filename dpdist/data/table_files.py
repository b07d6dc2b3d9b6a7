"""The sources that read tables from files: `parquet`, `arrow`, `csv`, `hf` and `webdataset`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dpdist.config import Data
from dpdist.data import arrow, csv_files, hf, webdataset
from dpdist.data.columns import wanted
from dpdist.data.parts import Parts, find_files, split, unnamed
from dpdist.data.sources import BadRecordError
from dpdist.data.table import Reading, Table, names_of_classes, to_source
from dpdist.errors import InputError


def open_arrow(
    path: Path, data: Data, suffixes: tuple[str, ...], *, reading: Reading, train: str | None, test: str | None
) -> Parts:
    """Open Parquet or Arrow files, whose names end in one of `suffixes`.

    Args:
        reading: how columns are read.
        train: the word of the train part where it is not `train`, as `find_files` takes it.
        test: likewise.

    Raises:
        InputError: an option, a file or a column cannot be used; so with the functions below.
    """
    first, second = find_files(path, suffixes, train=train, test=test)
    with unnamed(path, [*first, *second]):
        tables = [arrow.read_files(files, wanted(data.columns)) if files else None for files in (first, second)]
    return _parts(path, data, data.columns, reading, *tables)


def open_csv(path: Path, data: Data, *, reading: Reading, delimiter: Any, train: str | None, test: str | None) -> Parts:
    """Open CSV files; where `data.columns` does not say, all columns but `label` and `target` are `features`."""
    first, second = find_files(path, csv_files.SUFFIXES, train=train, test=test)
    unit = (data.columns or {}).get(data.unit, data.unit) if data.unit is not None else None
    with unnamed(path, [*first, *second]):
        tables = [csv_files.read_csv(files, delimiter, text=unit) if files else None for files in (first, second)]
    assert tables[0] is not None
    return _parts(path, data, csv_files.columns_of(tables[0], data.columns, data.unit), reading, *tables)


def open_hf(path: Path, data: Data, *, reading: Reading, train: str | None, test: str | None) -> Parts:
    """Open a directory that `save_to_disk` of `datasets` has made; `train` and `test` name splits."""
    return _parts(path, data, data.columns, reading, *hf.read_saved(path, wanted(data.columns), train=train, test=test))


def open_webdataset(path: Path, data: Data, *, reading: Reading, train: str | None, test: str | None) -> Parts:
    """Open the tar archives of a WebDataset."""
    first, second = find_files(path, webdataset.SUFFIXES, train=train, test=test)
    with unnamed(path, [*first, *second]):
        read = partial(webdataset.read_shards, wanted=wanted(data.columns), workers=data.workers)
        tables = [read(files) if files else None for files in (first, second)]
    return _parts(path, data, data.columns, reading, *tables)


def _parts(
    path: Path,
    data: Data,
    columns: dict[str, Any] | None,
    reading: Reading,
    first: Table | None,
    second: Table | None,
) -> Parts:
    assert first is not None
    train = to_source(first, columns, reading, f"train columns of {path}")
    names = names_of_classes(first, columns, reading)
    if second is None:
        train, test = split(train, data)
    else:
        if (others := names_of_classes(second, columns, reading)) != names:
            raise InputError(
                "data.path",
                str(path),
                "its test part has other classes than its train part, or another order of them; write both alike.",
            ) from BadRecordError(f"{names} to train on, {others} to test on")
        test = to_source(second, columns, reading, f"test columns of {path}")
    return Parts(train=train, test=test, classes=None if names is None else len(names), label_names=names)
