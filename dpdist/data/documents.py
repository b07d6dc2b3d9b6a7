"""Documents in files: lines of `.txt`, or a column of JSON lines, CSV, Parquet, Arrow or a saved `datasets` dataset."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.data import arrow, hf
from dpdist.data.csv_files import SUFFIXES as CSV
from dpdist.data.csv_files import read_csv
from dpdist.data.parts import find_files, unnamed
from dpdist.data.sources import BadRecordError
from dpdist.data.table import Table, Texts, Unusable
from dpdist.errors import InputError

SUFFIXES = (".txt", ".jsonl", *CSV, *arrow.PARQUET, *arrow.ARROW)


def read_documents(path: Path, *, train: str | None, test: str | None) -> tuple[Table, Table | None]:
    """The columns of the train and the test documents at `path`, one of them text.

    Raises:
        InputError: there are no files, or one is damaged.
    """
    if hf.is_saved(path):
        return hf.read_saved(path, train=train, test=test)
    first, second = find_files(path, SUFFIXES, train=train, test=test)
    with unnamed(path, [*first, *second]):
        return _read(first), _read(second) if second else None


def _read(files: Sequence[Path]) -> Table:
    kinds = {next((end for end in SUFFIXES if file.name.lower().endswith(end)), None) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise InputError("data.path", str(files[0]), f"give files of one kind, of {', '.join(SUFFIXES)}.")
    (kind,) = kinds
    if kind == ".txt":
        return {"text": Texts(Lines(files))}
    if kind == ".jsonl":
        return _json_lines(files)
    return read_csv(files) if kind in CSV else arrow.read_files(files, None)


class Lines(Sequence[str]):
    """The lines of text files that are not blank, memory-mapped.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps, begins, ends, owners = [], [], [], []
        for number, file in enumerate(files):
            try:
                with file.open("rb") as opened:
                    size = file.stat().st_size
                    content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            except OSError as error:
                raise InputError("data.path", str(file), f"cannot be read: {error.strerror}.") from None
            self._maps.append(content)
            begin = 0
            for end in _line_ends(content):
                if content[begin:end].strip():
                    begins.append(begin)
                    ends.append(end)
                    owners.append(number)
                begin = end + 1
        self._places = np.array([owners, begins, ends], np.int64)

    def __len__(self) -> int:
        return self._places.shape[1]

    def __getitem__(self, index: Any) -> Any:
        owner, begin, end = self._places[:, index].tolist()
        return self._maps[owner][begin:end].decode()


def _line_ends(content: Any) -> Iterator[int]:
    end = content.find(b"\n")
    while end >= 0:
        yield end
        end = content.find(b"\n", end + 1)
    yield len(content)


def _json_lines(files: Sequence[Path]) -> Table:
    """The columns of JSON objects, one a line, all with the same keys."""
    rows: list[dict[str, Any]] = []
    for file in files:
        for index, line in enumerate(Lines([file])):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
                    raise ValueError("is no object, or has other keys than the first")
            except ValueError as error:
                raise InputError(
                    "data.path", str(file), "needs one JSON object a line, all with the same keys."
                ) from BadRecordError(f"document {index}: {error}")
            rows.append(row)
    return {name: _json_column([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def _json_column(values: list[Any]) -> Any:
    if all(value is None or isinstance(value, str) for value in values):
        return Texts(values)
    try:
        column = np.array(values)
    except ValueError:
        return Unusable("values that make no array")
    return column if column.dtype.kind in "biuf" else Unusable("values that are no numbers")
