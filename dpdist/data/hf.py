"""Datasets of the library `datasets` (Hugging Face): saved by `save_to_disk`, or objects of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist.data import arrow, optional
from dpdist.data.parts import choose_parts
from dpdist.data.table import Table
from dpdist.errors import InputError


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` has made this directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(
    path: Path, wanted: Sequence[str] | None = None, *, train: str | None, test: str | None
) -> tuple[Table, Table | None]:
    """The train and the test columns of a directory that `datasets` has saved; without splits, there is no test part.

    Args:
        wanted: as `columns_of` takes it.
        train: the split to train on, where it is not called `train`.
        test: the split to test on; None takes `test`, else `validation`.

    Raises:
        InputError: it is no such directory, or has no such split.
    """
    library = optional.load("datasets", "hf")
    if not is_saved(path):
        there = "is no directory that `save_to_disk` of `datasets` has made" if path.exists() else "no such directory"
        remedy = "name a Dataset or DatasetDict saved so; for Parquet files give data.source=parquet."
        raise InputError("data.path", str(path), f"{there}; {remedy}")
    try:
        saved = library.load_from_disk(str(path))
    except Exception as error:  # of many kinds, by what is damaged
        raise InputError("data.path", str(path), "cannot be read: damaged, or of a newer `datasets`.") from error
    if isinstance(saved, dict):
        first, second = choose_parts(dict(saved), train=train, test=test, where=str(path))
        return columns_of(first, wanted), None if second is None else columns_of(second, wanted)
    for option, asked in (("train", train), ("test", test)):
        if asked is not None:
            raise InputError(f"data.options.{option}", asked, f"{path} is one Dataset and has no splits; leave it out.")
    return columns_of(saved, wanted), None


def columns_of(dataset: Any, wanted: Sequence[str] | None = None) -> Table:
    """The columns of a `datasets.Dataset`: memory-mapped images stay on disk, numbers are read.

    Args:
        wanted: the columns to read; None reads all. Where one is missing, all are listed.
    """
    if wanted is not None and set(wanted) <= set(dataset.column_names):
        dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
    return arrow.columns_of(dataset.with_format("arrow")[:])
