"""Images in folders, one folder a class: `train/cat/1.png`, `test/dog/2.jpg`, or `cat/1.png` to be split by index.

The names of the folders and how many there are, the classes, are taken as public.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.config import Data
from dpdist.data.encoded import EncodedSource
from dpdist.data.images import SUFFIXES, Images
from dpdist.data.parts import Parts, choose_parts, part_named, split
from dpdist.data.sources import WHERE_NAMED, BadRecordError
from dpdist.errors import InputError


def open_image_folder(
    path: Path, data: Data, *, size: Any, mode: str, train: str | None = None, test: str | None = None
) -> Parts:
    """Open the images in the class folders at `path`: `image`, uint8[height, width, channels], and `label`, int32.

    Classes are numbered in order of name. Images are decoded when they are read.

    Args:
        path: holds the class folders, or a folder for train and one for test that do.
        size: as `dpdist.data.images.Images` takes it, as is `mode`.
        train: the folder of the train part, where it is not called `train`.
        test: likewise.

    Raises:
        InputError: there are no class folders or images, or there is a file that is no image.
    """
    if not path.is_dir():
        raise InputError("data.path", str(path), "no such directory; name one that holds a folder for each class.")
    folders = {each: path / each for each in _folders(path)}
    if train is None and test is None and not _has_parts(folders):
        classes = _classes(path)
        first, second = split(_images(path, classes, size, mode), data)
    else:
        train_folder, test_folder = choose_parts(folders, train=train, test=test, where=str(path))
        classes = _classes(train_folder)
        first = _images(train_folder, classes, size, mode)
        if test_folder is None:
            first, second = split(first, data)
        else:
            if unknown := sorted(set(_folders(test_folder)) - set(classes)):
                raise InputError(
                    "data.path",
                    str(path),
                    f"its test folder holds {len(unknown)} folders that its train folder has not; the classes are "
                    f"those of the train folder; {WHERE_NAMED}.",
                ) from BadRecordError(f"such as {unknown[0]} in {test_folder.name}")
            second = _images(test_folder, classes, size, mode)
    return Parts(train=first, test=second, classes=len(classes), label_names=tuple(classes))


def _has_parts(folders: dict[str, Path]) -> bool:
    """Whether these are a train and perhaps a test folder; a class may be called `train`, too, but holds no folders.

    Raises:
        InputError: they are, but for one.
    """
    if not any(part_named(name) == "train" and _folders(folder) for name, folder in folders.items()):
        return False
    if stray := [name for name in folders if part_named(name) is None]:
        raise InputError(
            "data.path",
            str(next(iter(folders.values())).parent),
            f"has {len(stray)} other folders beside a train folder with classes; move them away, or name the folders "
            f"of both parts in data.options: {{train: ..., test: ...}}; {WHERE_NAMED}.",
        ) from BadRecordError(f"such as {stray[0]}")
    return True


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _classes(path: Path) -> list[str]:
    names = _folders(path)
    if len(names) < 2:
        found = "only one folder" if names else "no folder"
        raise InputError("data.path", str(path), f"holds {found}; it needs one for each of at least 2 classes.")
    return names


def _images(path: Path, classes: list[str], size: Any, mode: str) -> EncodedSource:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        # Sorted, because the order of a directory listing differs between machines.
        for folder, folders, names in os.walk(path / name):
            folders.sort()
            if any(Path(folder, each).is_symlink() for each in folders):
                remedy = (
                    "has a link to a folder within a class folder, whose images would be left out, or be there twice; "
                    "put the images there, or link the class folder itself."
                )
                raise InputError("data.path", str(path), remedy)
            for file in sorted(names):
                if not file.startswith("."):
                    files.append(os.path.relpath(f"{folder}/{file}", path))
                    labels.append(label)
    if strays := [file for file in files if not file.lower().endswith(SUFFIXES)]:
        raise InputError(
            "data.path",
            str(path),
            f"holds {len(strays)} files in its class folders that are no images; move them away, or convert them to "
            f"one of {', '.join(SUFFIXES)}.",
        ) from BadRecordError(f"such as {strays[0]}")
    if not files:
        raise InputError("data.path", str(path), f"has no images ({', '.join(SUFFIXES)}) in its class folders.")
    images = Images(
        lambda index: (path / files[index]).read_bytes(),
        len(files),
        name=lambda index: files[index],
        identity="\0".join(files),
        size=size,
        mode=mode,
    )
    return EncodedSource({"label": np.array(labels, np.int32)}, [images])
