"""Parquet and Arrow files, and any Arrow table, as columns.

Numbers are read into memory, fixed-size lists as further axes. Images, as `datasets` writes them (`{bytes, path}`, or
bytes alone), stay encoded: of Arrow files on disk, since these are memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.data import optional
from dpdist.data.sources import BadRecordError
from dpdist.data.table import Classes, Column, Pictures, Table, Texts, Unusable
from dpdist.errors import InputError

#: File names end so.
PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather", ".ipc")


def read_files(files: Sequence[Path], wanted: Sequence[str] | None) -> Table:
    """The columns of Parquet or Arrow files, one after the other.

    Args:
        wanted: the columns to read; None reads all. Where one is missing, all are listed, maybe without rows.

    Raises:
        InputError: a file is damaged, or two differ in their columns.
    """
    arrow = optional.load("pyarrow", "parquet and arrow files")
    tables = [_parquet(file, wanted) if _is_parquet(file) else _arrow(file, wanted) for file in files]
    for file, table in zip(files, tables, strict=True):
        if _known(table) != _known(tables[0]):
            raise InputError(
                "data.path",
                str(file),
                "says other class names, or another order of them, than the first of its part; write all files alike.",
            )
        if not table.schema.equals(tables[0].schema):
            raise InputError(
                "data.path",
                str(file),
                "has other columns, or of other types, than the first of its part; all files of a part need the same.",
            ) from BadRecordError(f"{_shown(table.schema)}, and in {files[0].name} {_shown(tables[0].schema)}")
    return columns_of(arrow.concat_tables(tables), folder=files[0].parent)


def _is_parquet(file: Path) -> bool:
    """Whether a file begins as Parquet does, whatever its name."""
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"PAR1"
    except OSError as error:
        raise _damaged(file, "Parquet or Arrow", error) from error


def _parquet(file: Path, wanted: Sequence[str] | None) -> Any:
    arrow, parquet = (optional.load(name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        # Not a `ParquetDataset`: names of folders such as `label=3` would become columns.
        opened = parquet.ParquetFile(file, memory_map=True)
        schema = opened.schema_arrow
        if wanted is not None and not set(wanted) <= set(schema.names):
            return schema.empty_table()
        return opened.read(columns=wanted if wanted is None else list(dict.fromkeys(wanted)))
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(file, "Parquet", error) from error


def _arrow(file: Path, wanted: Sequence[str] | None) -> Any:
    arrow = optional.load("pyarrow", "arrow")
    try:
        mapped = arrow.memory_map(str(file))
        try:
            table = arrow.ipc.open_file(mapped).read_all()
        except arrow.ArrowInvalid:  # the other of the two formats, which `datasets` writes
            mapped.seek(0)
            table = arrow.ipc.open_stream(mapped).read_all()
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(file, "Arrow", error) from error
    if wanted is None or not set(wanted) <= set(table.column_names):
        return table
    return table.select(list(dict.fromkeys(wanted)))


def _damaged(file: Path, form: str, error: Exception) -> InputError:
    # In our own words: what pyarrow says may quote the file's first bytes.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or of another format"
    return InputError("data.path", str(file), f"cannot be read as {form} ({reason}); write it again.")


def _shown(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def columns_of(table: Any, *, folder: Path = Path()) -> Table:
    """The columns of an Arrow table.

    Args:
        folder: what paths of image columns without bytes are relative to.
    """
    known = _known(table)
    return {name: _column(table.column(name), known.get(name), folder) for name in table.column_names}


def _known(table: Any) -> dict[str, Any]:
    """What `datasets` has written of the columns."""
    return json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})


def _column(column: Any, feature: Any, folder: Path) -> Column:
    """One column, with what the schema that `datasets` writes says of it."""
    arrow = optional.load("pyarrow", "arrow tables")
    types, kind = arrow.types, column.type
    feature = feature if isinstance(feature, Mapping) else {}
    if isinstance(kind, arrow.BaseExtensionType):  # `Array2D` of `datasets`, say
        column = arrow.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
        kind = kind.storage_type
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return Texts(_Values(column))
    if _is_image(types, kind) and feature.get("_type", "Image") == "Image":
        return Pictures(lambda index: _image_bytes(column[index].as_py(), folder), len(column))
    chunks = [_dense(arrow, chunk) for chunk in column.chunks]
    if not chunks:
        return Unusable("no rows")
    if wrong := [chunk for chunk in chunks if isinstance(chunk, Unusable)]:
        return wrong[0]
    if len({chunk.shape[1:] for chunk in chunks}) > 1:
        return Unusable("lists of differing lengths")
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    names = feature.get("names")
    return Classes(values, tuple(map(str, names))) if feature.get("_type") == "ClassLabel" and names else values


class _Values(Sequence[Any]):
    """A column's values as Python has them, each made when it is asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


def _is_image(types: Any, kind: Any) -> bool:
    """Whether a column holds bytes, or structs with `bytes` and `path`."""
    if types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _image_bytes(value: Any, folder: Path) -> bytes:
    """The bytes of an image as `datasets` writes it.

    Raises:
        ValueError: it is missing.
        OSError: it is in another file, which cannot be read.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if content is not None:
        return content
    if not isinstance(value, Mapping) or value.get("path") is None:
        raise ValueError("the image is missing")
    return (folder / value["path"]).read_bytes()


def _dense(arrow: Any, chunk: Any) -> Any:
    """An Arrow array of numbers, or of lists of equally many, as array[n, ...]; `Unusable` for anything else."""
    types, kind = arrow.types, chunk.type
    if isinstance(kind, arrow.BaseExtensionType):
        chunk, kind = chunk.storage, kind.storage_type
    if chunk.null_count:
        return Unusable(f"{kind} with missing values")
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return chunk.to_numpy(zero_copy_only=False)
    if types.is_fixed_size_list(kind):
        width = kind.list_size
    elif types.is_list(kind) or types.is_large_list(kind):
        lengths = np.unique(chunk.value_lengths().to_numpy(zero_copy_only=False))
        if lengths.size > 1:
            return Unusable("lists of differing lengths; pad them to one")
        width = int(lengths[0]) if lengths.size else 0
    else:
        return Unusable(str(kind))
    inner = _dense(arrow, chunk.flatten())
    return inner if isinstance(inner, Unusable) else inner.reshape(len(chunk), width, *inner.shape[1:])
