"""WebDataset: a record is the files of one stem in a tar archive, the shard: `0001.jpg`, `0001.cls`, `0001.json`.

Its ending says what a file holds: `.jpg` and other images are the column `image`, `.cls` is `label`, `.txt` is `text`,
the keys of `.json` are columns, `.npy` is an array. A longer ending names the column: `0001.mask.png` is `mask`.

A Poisson sample takes records from anywhere, so shards are not streamed: where the files begin is looked up when a run
starts, and an image is read from its place in the shard.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpdist.data.images import SUFFIXES as IMAGES
from dpdist.data.sources import WHERE_NAMED, BadRecordError
from dpdist.data.table import Column, Pictures, Table, Texts, Unusable, of_cells, of_texts
from dpdist.errors import InputError

#: File names of shards end so; the compressed ones are refused, not left aside.
SUFFIXES = (".tar", ".tar.gz", ".tgz")
#: What an ending says of a file, and the column where it is the whole ending.
_KINDS = {".cls": ("class", "label"), ".txt": ("text", "text"), ".npy": ("array", "npy"), ".json": ("keys", "json")}
_KINDS |= dict.fromkeys(IMAGES, ("image", "image"))
#: Headers and contents of a tar archive begin at multiples of it; zeros of this length end it.
_BLOCK = 512


class _Content(NamedTuple):
    """A column of a record."""

    #: `image`, `class`, `text`, `array`, `keys`; empty for what we cannot read.
    kind: str
    offset: int
    size: int


class _Files:
    """The files of one column, one a record.

    Args:
        shards: the archives.
        places: int64[N, 3], of each the number of its archive, where it begins, and its bytes.
    """

    def __init__(self, shards: Sequence[Path], places: np.ndarray) -> None:
        self._shards, self._places = shards, places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> bytes:
        shard, offset, size = self._places[index].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        """The shard and the file's name there; looked up again, as it is for errors alone."""
        shard, offset, _ = self._places[index].tolist()
        with tarfile.open(self._shards[shard], "r:") as archive:
            names = (member.name for member in archive if member.offset_data == offset)
            return f"{next(names, '?')} of {self._shards[shard].name}"


def read_shards(shards: Sequence[Path], wanted: Sequence[str] | None, workers: int) -> Table:
    """The columns of shards, one shard after the other; within one, records are in the order of their first files.

    Args:
        wanted: the columns to read; None reads all. Where one is missing, all are listed.
        workers: threads that look through the shards.

    Raises:
        InputError: a shard is no whole tar archive, or records differ in their files.
    """
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(_look_through, shards))
    kinds = {name: kind for name, (kind, _) in found[0].items()}
    for shard, columns in zip(shards, found, strict=True):
        if (other := {name: kind for name, (kind, _) in columns.items()}) != kinds:
            raise _differing(shard, f"{other}, and in {shards[0].name} {kinds}")
    files = {
        name: _Files(
            shards, np.concatenate([np.insert(columns[name][1], 0, shard, 1) for shard, columns in enumerate(found)])
        )
        for name in kinds
    }
    return _table(files, kinds, wanted)


def _look_through(shard: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What each column of a shard's records is, and its files' offsets and bytes, int64[n, 2].

    Raises:
        InputError: it is no whole tar archive, or its records differ in their files.
    """
    records = _records(shard)
    expected: dict[str, str] | None = None
    for key, record in records.items():
        kinds = {name: content.kind for name, content in sorted(record.items())}
        expected = expected or kinds
        if kinds != expected:
            raise _differing(shard, f"{key} has {kinds}, and {next(iter(records))} {expected}")
    if expected is None:
        raise InputError("data.path", str(shard), "has no records, which are files such as 0001.jpg and 0001.cls.")
    return {
        name: (kind, np.array([record[name][1:] for record in records.values()], np.int64))
        for name, kind in expected.items()
    }


def _differing(shard: Path, private: str) -> InputError:
    remedy = "has records of other files than the first record of its part; give each one file of every ending."
    error = InputError("data.path", str(shard), remedy)
    error.__cause__ = BadRecordError(private)
    return error


def _records(shard: Path) -> dict[str, dict[str, _Content]]:
    """The columns of a shard's records, by the records' keys.

    Raises:
        InputError: it is no whole tar archive, or holds what is no file of a record.
    """
    records: dict[str, dict[str, _Content]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, _, file = member.name.rpartition("/")
                if member.isdir() or file.startswith(".") or (file.startswith("__") and file.endswith("__")):
                    continue  # hidden, or what `webdataset` keeps for itself
                stem, dot, ending = file.partition(".")
                if not member.isreg() or member.issparse() or not dot:
                    raise InputError(
                        "data.path",
                        str(shard),
                        "holds a link, or a file without an ending; a record is whole files such as 0001.jpg.",
                    ) from BadRecordError(member.name)
                name, kind = _column_of(ending)
                record = records.setdefault(f"{folder}/{stem}", {})
                if name in record:
                    raise InputError(
                        "data.path",
                        str(shard),
                        "holds two files for one column of a record; give every record a name of its own.",
                    ) from BadRecordError(member.name)
                record[name] = _Content(kind, member.offset_data, member.size)
        _require_whole(shard, end)
    except InputError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, cut off or compressed"
        raise InputError(
            "data.path", str(shard), f"cannot be read as a tar archive ({reason}); write it again, uncompressed."
        ) from error
    return records


def _require_whole(shard: Path, end: int) -> None:
    """Check that an archive ends where its last file does: what is cut off, or appended, would be left out in silence.

    Raises:
        EOFError: there are no zeros that end it, or something follows.
    """
    with shard.open("rb") as file:
        file.seek(end)
        first = file.read(_BLOCK)
        if len(first) < _BLOCK or any(map(any, chain([first], iter(lambda: file.read(1 << 20), b"")))):
            raise EOFError


def _column_of(ending: str) -> tuple[str, str]:
    """The column that an ending such as `mask.png` names, and its kind."""
    name, _, last = ending.rpartition(".")
    kind, usual = _KINDS.get(f".{last}".lower(), ("", ending))
    return (name or usual) if kind else ending, kind


def _table(files: dict[str, _Files], kinds: dict[str, str], wanted: Sequence[str] | None) -> Table:
    table = {
        name: _column(files[name], kind, wanted is None or name in wanted)
        for name, kind in kinds.items()
        if kind != "keys"
    }
    if wanted is not None and set(wanted) <= set(table):
        return table
    for name in (name for name, kind in kinds.items() if kind == "keys"):
        for key, column in _keys(files[name]).items():
            if key in table:
                raise InputError(
                    "data.path",
                    "a .json file",
                    "has a key that is the column of another file, too; rename that one, such as 0001.other.cls.",
                ) from BadRecordError(f"column {key!r}")
            table[key] = column
    return table


def _column(files: _Files, kind: str, is_wanted: bool) -> Column:
    if kind == "image":
        return Pictures(files.read, len(files), files.name)
    if not kind or not is_wanted:
        return Unusable("files of an ending that is not known" if is_wanted else "files that were not read")
    if kind == "array":
        return of_cells(_each(files, lambda content: np.load(io.BytesIO(content), allow_pickle=False)))
    texts = _each(files, bytes.decode)
    return Texts(texts) if kind == "text" else of_texts([text.strip() for text in texts])


def _keys(files: _Files) -> Table:
    """The columns that the keys of `.json` files give; one that not all have is a column with missing values."""
    objects = _each(files, json.loads)
    if not all(isinstance(each, dict) for each in objects):
        raise InputError("data.path", "a .json file", "holds something else than one object of keys and values.")
    return {key: of_cells([each.get(key) for each in objects]) for key in dict.fromkeys(k for o in objects for k in o)}


def _each(files: _Files, read: Callable[[bytes], Any]) -> list[Any]:
    """What `read` makes of every file.

    Raises:
        InputError: it cannot read one.
    """
    values = []
    for index in range(len(files)):
        try:
            values.append(read(files.read(index)))
        except (ValueError, EOFError, OSError) as error:
            raise InputError(
                "data.path", "a file of a shard", f"cannot be read; mend it or take it out; {WHERE_NAMED}."
            ) from BadRecordError(f"{files.name(index)}: {type(error).__name__}")
    return values
