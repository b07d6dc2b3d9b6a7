"""The train and the test part of what lies at `data.path`: by the names of files and folders, or split by index."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dpdist.config import Data
from dpdist.data.sources import WHERE_NAMED, BadRecordError, Source, Subset
from dpdist.errors import InputError

#: Words that say which part a file or folder holds, as is usual on the Hugging Face Hub and elsewhere.
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a built-in source has read."""

    train: Source
    #: None where the source has no test set of its own.
    test: Source | None = None
    #: As in `dpdist.data.Dataset`, as are the next two.
    classes: int | None = None
    label_names: tuple[str, ...] | None = None
    vocabulary: int | None = None


def split_indices(length: int, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Split `length` indices into train and test by a public permutation; both parts are sorted.

    The permutation is seeded by `data.split_seed`, and its first `data.test_fraction`, rounded up, is the test set. It
    sorts Philox words, because NumPy guarantees their stream across versions; it does not guarantee
    `Generator.permutation`.
    """
    order = np.argsort(np.random.Philox(data.split_seed).random_raw(length), kind="stable").astype(np.int64)
    held_out = math.ceil(length * data.test_fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def split(source: Source, data: Data) -> tuple[Source, Source]:
    """The train and the test examples of `source`, by `split_indices`."""
    kept, held_out = split_indices(len(source), data)
    return Subset(source, kept), Subset(source, held_out)


def part_named(name: str) -> str | None:
    """`train`, `test` or `validation`, by the words of a name such as `train-00000-of-00002`; None says neither."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((part for part, known in WORDS.items() if any(word in known for word in words)), None)


def choose_parts(found: dict[str, T], *, train: str | None, test: str | None, where: str) -> tuple[T, T | None]:
    """The train and the test part out of parts by name, such as the splits of a `DatasetDict`.

    Args:
        found: parts by name.
        train: the name of the train part, from `data.options.train`; None takes the one that is named so.
        test: likewise; None takes `test`, else `validation`, else none.
        where: what they are parts of, for errors.

    Raises:
        InputError: there is no such part.
    """
    by_part = {part_named(name): name for name in reversed(found)}
    by_part |= {name: name for name in WORDS if name in found}  # `train` before `train_noisy`
    chosen = []
    for option, asked, usual in (("train", train, ("train",)), ("test", test, ("test", "validation"))):
        name = asked or next((by_part[part] for part in usual if part in by_part), None)
        if (asked is not None or option == "train") and name not in found:
            raise InputError(
                f"data.options.{option}", asked, f"{where} has {len(found)} parts and no such one; {WHERE_NAMED}."
            ) from BadRecordError(f"name one of {', '.join(map(str, found))}")
        chosen.append(None if name is None else found[name])
    first, second = chosen
    assert first is not None
    return first, second


def find_files(path: Path, suffixes: Sequence[str], *, train: str | None, test: str | None) -> tuple[list[Path], ...]:
    """The files of the train and of the test part at `path`, in order of name; the latter may be empty.

    A file is all there is, and is split by index later. In a directory, a file belongs to the part that its folder's or
    its own name says, by a word of it: `train/0.parquet`, `train-00000-of-00002.parquet`, `test.csv`. If no name says
    anything, all files are one part. Hidden files are left aside; `validation` is, too, where there is a `test`.

    Args:
        suffixes: such as `.parquet`; other files are not looked at.
        train: the word that train files have instead of `train`, from `data.options.train`.
        test: likewise.

    Raises:
        InputError: there are no such files, or some belong to neither part.
    """
    if path.is_file():
        return [path], []
    endings = " or ".join(suffixes)
    if not path.is_dir():
        raise InputError("data.path", str(path), f"no such file or directory; name {endings} files or their directory.")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.lower().endswith(tuple(suffixes))
        and not any(each.startswith(".") for each in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise InputError("data.path", str(path), f"has no {endings} files; name the directory that holds them.")
    stems: dict[Path, Path] = {}
    for file in files:
        stem = file.with_name(file.name.partition(".")[0])
        if stem in stems:
            raise InputError(
                "data.path",
                str(path),
                "two of its files seem to be one file twice, and a record that is there twice gets half the "
                f"protection; move one away; {WHERE_NAMED}.",
            ) from BadRecordError(f"{file.relative_to(path)} and {stems[stem].relative_to(path)}")
        stems[stem] = file
    by_name: dict[str | None, list[Path]] = {}
    for file in files:
        by_name.setdefault(_part_of(file.relative_to(path), train, test), []).append(file)
    if set(by_name) == {None} and train is None and test is None:
        return files, []
    if stray := by_name.pop(None, []):
        raise InputError(
            "data.path",
            str(path),
            f"{len(stray)} of its {len(files)} files have no part in their name, while others have; put `train` or "
            f"`test` into it, or move them away; {WHERE_NAMED}.",
        ) from BadRecordError(f"such as {stray[0].relative_to(path)}")
    first, second = choose_parts(
        {str(name): files for name, files in by_name.items()}, train=train, test=test, where=str(path)
    )
    return first, second or []


@contextlib.contextmanager
def unnamed(path: Path, files: Sequence[Path]) -> Iterator[None]:
    """Say of an error about one of the files found at `path` its place among them: its name may be a person's.

    Raises:
        InputError: one was raised in the block; the name is in its cause.
    """
    try:
        yield
    except InputError as error:
        ordered = sorted(files)
        place = next((number for number, file in enumerate(ordered, start=1) if error.value == str(file)), None)
        if place is None or path.is_file():
            raise
        private = BadRecordError(f"{ordered[place - 1].relative_to(path)}: {error.__cause__ or error.remedy}")
        private.__cause__ = error
        remedy = f"file {place} of {len(ordered)}, in order of name: {error.remedy}"
        raise InputError(error.field, str(path), remedy) from private


def _part_of(file: Path, train: str | None, test: str | None) -> str | None:
    """The part of a file, by the innermost folder that says one, else by its own name."""
    stem = file.name.partition(".")[0]
    for name in [*reversed(file.parts[:-1]), stem]:
        words = re.split(r"[^a-z]+", name.lower())
        for asked in (train, test):
            if asked is not None and (asked == name or asked.lower() in words):
                return asked
        if (part := part_named(name)) is not None:
            return part
    return None
