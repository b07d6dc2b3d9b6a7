"""Read IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist), plain or gzipped.

An IDX file has two zero bytes, a byte for the dtype, a byte for the number of dimensions, the dimensions as big-endian
uint32, and then the values, big-endian too. Plain files are memory-mapped, so that the processes of a node share one
copy; a gzipped file is decompressed into the memory of each process.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from dpdist.errors import InputError

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"
LONGEST_HEADER = 4 + 4 * 255


def read_mnist(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the train and the test columns of a directory with MNIST's four files, each plain or `.gz`.

    Returns:
        Two dicts with `image`, [n, height, width, 1] in the file's dtype, and `label`, int32[n].

    Raises:
        InputError: a file is missing or damaged, or its array has another number of dimensions.
    """
    return _read_pair(directory, "train"), _read_pair(directory, "t10k")


def _read_pair(directory: Path, prefix: str) -> dict[str, np.ndarray]:
    images = _read_named(directory, f"{prefix}-images-idx3-ubyte", rank=3)
    labels = _read_named(directory, f"{prefix}-labels-idx1-ubyte", rank=1)
    if labels.dtype.kind not in "iu":
        raise InputError(
            "data.path", str(directory), f"its {prefix} labels are {labels.dtype.name}; labels are integers."
        )
    return {"image": images[..., np.newaxis], "label": labels.astype(np.int32)}


def _read_named(directory: Path, name: str, rank: int) -> np.ndarray:
    candidates = [directory / name, directory / f"{name}.gz"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InputError(
            "data.path",
            str(directory),
            f"found neither {name} nor {name}.gz there; name the directory that holds them.",
        )
    array = read_idx(path)
    if array.ndim != rank:
        raise InputError(
            "data.path",
            str(path),
            f"holds an array of shape {array.shape}, but {rank} "
            f"dimension{'s' if rank > 1 else ''} belong there; are the files swapped?",
        )
    return array


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an IDX file, big-endian as stored.

    Its content, not its suffix, says whether the file is gzipped: downloads often have the wrong suffix.

    Raises:
        InputError: the file cannot be read, is not IDX, or does not have the size that its header implies.
    """
    try:
        with path.open("rb") as file:
            head = file.read(LONGEST_HEADER)
        if not head.startswith(GZIP_MAGIC):
            dtype, shape, offset = _layout(path, head, found=path.stat().st_size)
            return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
        content, damage = _unpack(path)
    except OSError as error:
        raise InputError("data.path", str(path), f"cannot be read: {error.strerror}.") from None
    dtype, shape, offset = _layout(path, bytes(content[:LONGEST_HEADER]), found=len(content), damage=damage)
    return np.frombuffer(content, dtype, count=math.prod(shape), offset=offset).reshape(shape)


def _unpack(path: Path) -> tuple[bytearray, str]:
    """Return as much content as can be decompressed and, if that is not all, gzip's complaint; else an empty string."""
    content = bytearray()
    with gzip.open(path) as file:
        try:
            while chunk := file.read1(1 << 20):
                content += chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return content, f"gzip says {type(error).__name__}; "  # its text has a checksum of the content
    return content, ""


def _layout(path: Path, head: bytes, found: int, damage: str = "") -> tuple[str, tuple[int, ...], int]:
    """Return the values' dtype, shape and offset from the header `head`; the file's size must be `found` bytes."""
    expected = 4 + 4 * head[3] if len(head) >= 4 else 4
    if len(head) >= 4 and (head[:2] != b"\0\0" or head[2] not in DTYPES):
        raise InputError(
            "data.path",
            str(path),
            "is not an IDX file: it does not start with 00 00, a known dtype and the number of dimensions.",
        )
    if found >= expected:
        offset, shape = expected, struct.unpack_from(f">{head[3]}I", head, 4)
        expected += math.prod(shape) * np.dtype(DTYPES[head[2]]).itemsize
    if found != expected or damage:
        raise InputError(
            "data.path",
            str(path),
            f"is damaged: {damage}expected "
            f"{'at least ' if found < 4 else ''}{expected:,} bytes, found {found:,}; "
            "fetch it again.",
        )
    return DTYPES[head[2]], shape, offset
