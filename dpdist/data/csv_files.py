"""CSV and TSV files with a line of column names, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist.data.sources import BadRecordError
from dpdist.data.table import Table, Texts, is_number, of_texts
from dpdist.errors import InputError

#: File names end so.
SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
#: Columns that are no features, whatever they hold.
TARGETS = ("label", "target")


def read_csv(files: Sequence[Path], delimiter: str | None = None, text: str | None = None) -> Table:
    """The columns of CSV files, one file after the other: numbers where every cell is one, else text.

    Args:
        delimiter: one character; None is a tab for `.tsv`, else a comma.
        text: the column that is text whatever it looks like: `001` and `1` are two people.

    Raises:
        InputError: a file cannot be read, has no names, or has lines of another number of cells.
    """
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise InputError("data.options.delimiter", delimiter, "give one character, such as ';'.")
    names: list[str] | None = None
    cells: list[list[str]] = []
    for file in files:
        rows = _rows(file, delimiter or ("\t" if ".tsv" in file.suffixes else ","))
        head = rows.pop(0) if rows else []
        if not head or any(is_number(name) or not name.strip() for name in head) or len(set(head)) < len(head):
            raise InputError(
                "data.path",
                str(file),
                "its first line has to name the columns, each once; a number or nothing names none.",
            )
        if names is not None and head != names:
            raise InputError(
                "data.path", str(file), "has other columns than the first of its part; give all files the same."
            ) from BadRecordError(f"{', '.join(head)}, and in {files[0].name} {', '.join(names)}")
        names = head
        for line, row in enumerate(rows, start=2):
            if len(row) != len(names):
                raise InputError(
                    "data.path", str(file), f"has lines of another number of cells than the {len(names)} of its first."
                ) from BadRecordError(f"row {line} has {len(row)}")
        cells += rows
    assert names is not None
    by_column = list(zip(*cells, strict=True)) or [()] * len(names)
    return {
        name: Texts(values) if name == text else of_texts(values) for name, values in zip(names, by_column, strict=True)
    }


def _rows(file: Path, delimiter: str) -> list[list[str]]:
    try:
        with gzip.open(file, "rt", **_TEXT) if file.suffix == ".gz" else file.open(**_TEXT) as lines:
            return [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    except UnicodeDecodeError:
        raise InputError("data.path", str(file), "is not UTF-8; save it as UTF-8.") from None
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError("data.path", str(file), "is damaged, or no CSV file.") from error
    except OSError as error:
        raise InputError("data.path", str(file), f"cannot be read: {error.strerror}.") from None


#: As spreadsheets write it, too.
_TEXT: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}


def columns_of(table: Table, columns: dict[str, Any] | None, unit: str | None) -> dict[str, Any]:
    """`data.columns`, completed: `label`, `target` and the unit are themselves, `features` is what is left, stacked.

    Where `data.columns` names more than these, it stays as it is.

    Args:
        unit: `data.unit`.
    """
    apart = TARGETS if unit is None else (*TARGETS, unit)
    named = {name: name for name in apart if name in table} if columns is None else columns
    if set(named) - set(apart):
        return named
    # In order of name, so that another file with the same columns gives the same features.
    rest = sorted(name for name in table if name not in named.values() and name not in apart)
    return {"features": rest} | named if rest else named
