"""Small archives of CIFAR's official format, written as their authors wrote them."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.data.cifar import CIFAR100, Format


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what Python 2 wrote for the official files: byte strings, and NumPy's old module names."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: bytes | str) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, thing: Any, name: str | None = None) -> None:
        module = thing.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or thing.__qualname__}\n".encode())
        self.memoize(thing)

    dispatch[type] = dispatch[type(pickle.dumps)] = save_global


def dumps(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def write_directory(path: Path, content: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, file in content.items():
        (path / name).write_bytes(file)
    return path


def write_archive(path: Path, kind: Format, content: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, file in (content | {"readme.html": b"<html>"}).items():
            member = tarfile.TarInfo(f"{kind.directory}/{name}")
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    return path


def made_cifar100(path: Path, *, train: int, test: int) -> Path:
    """An archive of CIFAR-100's format with so many random images of its 100 classes."""
    content: dict[str, Any] = {}
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % CIFAR100.classes for i in range(count)]
        content[name] = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * count}
    content["meta"] = {"fine_label_names": [f"class {i}" for i in range(CIFAR100.classes)]}
    return write_archive(path, CIFAR100, {name: dumps(value) for name, value in content.items()})
