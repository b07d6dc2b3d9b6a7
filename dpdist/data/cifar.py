"""Read CIFAR-10 and CIFAR-100 from their official Python archives (https://www.cs.toronto.edu/~kriz/cifar.html).

The files inside are pickles, and loading a pickle can run any code that it names. We accept only NumPy arrays and plain
containers.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.errors import InputError

SIDE, CHANNELS = 32, 3
#: NumPy's private constructor, taken from an array because its module's name differs between versions.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
#: The only global names that occur in the official files.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """The file layout of CIFAR-10 or CIFAR-100."""

    #: File name of the official archive.
    archive: str
    #: The archive's MD5, as its authors publish it.
    md5: str
    #: The directory that it unpacks to.
    directory: str
    #: The training batches' files.
    train: tuple[str, ...]
    #: The test batch's file.
    test: str
    #: The file with the class names.
    meta: str
    #: Key of the labels in a batch.
    labels: str
    #: Key of the class names in `meta`.
    names: str
    classes: int


CIFAR10 = Format(
    archive="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    directory="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
    classes=10,
)
CIFAR100 = Format(
    archive="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    directory="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    classes=100,
)

Columns = dict[str, np.ndarray]


def read_cifar(path: Path, kind: Format, checksum: str | None) -> tuple[Columns, Columns, tuple[str, ...]]:
    """Return the train columns, the test columns and the class names.

    Args:
        path: the archive, or the directory that it unpacks to.
        kind: `CIFAR10`, or `CIFAR100` with its fine labels.
        checksum: MD5 that an archive must have. `official` means the published one, and is checked only if the archive
            has its official name. None checks nothing.

    Returns:
        Two dicts with `image`, uint8[n, 32, 32, 3], and `label`, int32[n]; and the classes' names.

    Raises:
        InputError: a file is missing or damaged, or does not have the expected content.
    """
    if path.is_dir():
        read = _directory_reader(path, kind)
    elif path.is_file():
        if checksum == "official":
            checksum = kind.md5 if path.name == kind.archive else None
        read = _archive_reader(path, kind, checksum)
    else:
        raise InputError(
            "data.path",
            str(path),
            f"no such file or directory; name {kind.archive} or the {kind.directory} it unpacks to.",
        )
    train, test = (_columns([(name, read(name)) for name in files], path, kind) for files in (kind.train, [kind.test]))
    names = _unpickle(read(kind.meta), path, kind.meta).get(kind.names)
    if not isinstance(names, list) or len(names) != kind.classes:
        raise _wrong(path, kind.meta, f"no list {kind.names!r} of {kind.classes} names")
    return train, test, tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _directory_reader(path: Path, kind: Format) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except FileNotFoundError:
            raise InputError(
                "data.path",
                str(path),
                f"has no file {name}; name {kind.archive} or the {kind.directory} it unpacks to.",
            ) from None
        except OSError as error:
            raise InputError("data.path", str(path / name), f"cannot be read: {error.strerror}.") from None

    return read


def _archive_reader(path: Path, kind: Format, checksum: str | None) -> Callable[[str], bytes]:
    wanted = {f"{kind.directory}/{name}": name for name in (*kind.train, kind.test, kind.meta)}
    found: dict[str, bytes] = {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError("data.path", str(path), f"cannot be read: {error.strerror}.") from None
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if checksum is not None and md5 != str(checksum).lower():
        raise InputError(
            "data.path",
            str(path),
            f"does not have the MD5 {checksum}: the download is damaged or another file; "
            "fetch it again (data.options.checksum: null takes it as it is).",
        )
    try:
        # Decompress everything first: gzip's checksum comes after the last byte that tarfile would read.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(content)), mode="r:") as archive:
            for member in archive:
                if member.name in wanted and (file := archive.extractfile(member)) is not None:
                    found[wanted[member.name]] = file.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError("data.path", str(path), "is no complete .tar.gz archive; fetch it again.") from error

    def read(name: str) -> bytes:
        if name not in found:
            raise InputError(
                "data.path", str(path), f"has no {kind.directory}/{name}; is it {kind.archive}, and complete?"
            )
        return found[name]

    return read


class _ForbiddenNameError(pickle.UnpicklingError):
    """The pickle names something that would run."""


class _Unpickler(pickle.Unpickler):
    """Rejects every global name that is not in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _ForbiddenNameError(f"it names {module}.{name}, which no file of CIFAR does")
        return ALLOWED[module, name]


def _unpickle(content: bytes, path: Path, name: str) -> dict[str, Any]:
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _ForbiddenNameError as error:
        raise _wrong(path, name, f"no complete pickle ({error})") from None
    except Exception as error:  # a damaged pickle may raise anything, and quote what it holds
        raise _wrong(path, name, f"no complete pickle ({type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise _wrong(path, name, f"a {type(loaded).__name__}, not a dict")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in loaded.items()}


def _columns(batches: list[tuple[str, bytes]], path: Path, kind: Format) -> Columns:
    images, labels = [], []
    for name, content in batches:
        batch = _unpickle(content, path, name)
        rows, numbers = batch.get("data"), batch.get(kind.labels)
        width = CHANNELS * SIDE * SIDE
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (width,):
            found = f"{rows.dtype}{rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise _wrong(path, name, f"no uint8 images of {width:,} values in 'data', but {found}")
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < kind.classes for n in numbers):
            raise _wrong(path, name, f"no list {kind.labels!r} of whole numbers below {kind.classes}")
        if len(numbers) != len(rows):
            raise _wrong(path, name, f"{len(rows):,} images but {len(numbers):,} labels")
        images.append(rows.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1))
        labels.append(np.array(numbers, np.int32))
    # Contiguous by example; otherwise `take` would copy the whole array at every step.
    return {"image": np.ascontiguousarray(np.concatenate(images)), "label": np.concatenate(labels)}


def _wrong(path: Path, name: str, what: str) -> InputError:
    return InputError("data.path", str(path), f"its {name} holds {what}; fetch the archive again.")
