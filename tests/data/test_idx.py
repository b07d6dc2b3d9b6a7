"""IDX files: every dtype, plain and gzipped, and every way in which a download fails."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpdist.config import Data
from dpdist.data import open_dataset
from dpdist.data.idx import read_idx
from dpdist.errors import InputError

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 5, 4), dtype=np.uint8)
LABELS = (np.arange(20) % 3).astype(np.uint8)
FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_family(directory: Path, *, test: int = 5, packed: bool = False) -> None:
    """Write the four files, with 20 train and `test` test examples."""
    for prefix, count in (("train", 20), ("t10k", test)):
        for name, array in (("images-idx3-ubyte", IMAGES[:count]), ("labels-idx1-ubyte", LABELS[:count])):
            if packed:
                (directory / f"{prefix}-{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (directory / f"{prefix}-{name}").write_bytes(idx(array))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_every_dtype_reads_back(tmp_path: Path, dtype: str, packed: bool) -> None:
    array = np.array([[0, 1, -3], [100, 7, 90]]).astype(dtype)
    (tmp_path / "x").write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = read_idx(tmp_path / "x")
    np.testing.assert_array_equal(read, array)
    assert read.dtype.name == dtype
    assert isinstance(read, np.memmap) is not packed


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_family_opens_with_a_channel_axis_and_int32_labels(tmp_path: Path, packed: bool) -> None:
    write_family(tmp_path, packed=packed)
    dataset = open_dataset(Data(source="idx", path=str(tmp_path)))
    assert (len(dataset.train), dataset.classes) == (20, 10)
    assert dataset.test is not None
    assert len(dataset.test) == 5
    example = dataset.train[7]
    np.testing.assert_array_equal(example["image"], IMAGES[7, :, :, None])
    assert example["image"].dtype == np.uint8
    assert example["label"] == LABELS[7]
    assert example["label"].dtype == np.int32


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_complete() -> None:
    dataset = open_dataset(Data(source="idx", path=str(FASHION)))
    assert dataset.test is not None
    for source, count in ((dataset.train, 60_000), (dataset.test, 10_000)):
        assert source.arrays["image"].shape == (count, 28, 28, 1)  # type: ignore[attr-defined]
        assert np.bincount(source.arrays["label"]).tolist() == [count // 10] * 10  # type: ignore[attr-defined]


def test_a_missing_file_is_named_with_both_names_tried(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        open_dataset(Data(source="idx", path=str(tmp_path)))


def test_the_path_is_needed() -> None:
    with pytest.raises(InputError, match=r"data\.path = None.*idx needs the path"):
        open_dataset(Data(source="idx"))


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_idx(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"<html>404</html>", b"\0\0\x07\x01\0\0\0\0", gzip.compress(b"hello")],
    ids=["a web page", "an unknown dtype", "another gzip file"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="is not an IDX file: it does not start with"):
        read_idx(tmp_path / "x")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda content: content[:300], "expected 416 bytes, found 300"),
        (lambda content: content[:10], "expected 16 bytes, found 10"),
        (lambda content: content[:3], "expected at least 4 bytes, found 3"),
        (lambda content: content + b"12", "expected 416 bytes, found 418"),
    ],
    ids=["values cut", "header cut", "magic cut", "too long"],
)
def test_a_wrong_number_of_bytes_is_reported(
    tmp_path: Path, change: Callable[[bytes], bytes], numbers: str, packed: bool
) -> None:
    content = change(idx(IMAGES))
    (tmp_path / "x").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=numbers):
        read_idx(tmp_path / "x")


def test_an_empty_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match="expected at least 4 bytes, found 0"):
        read_idx(tmp_path / "x")


def test_a_truncated_gzip_file_says_how_far_it_got(tmp_path: Path) -> None:
    packed = gzip.compress(idx(IMAGES), compresslevel=0)  # stored, so bytes in are bytes out
    (tmp_path / "x.gz").write_bytes(packed[:-100])
    with pytest.raises(InputError, match=r"expected 416 bytes, found 3[0-9][0-9]") as error:
        read_idx(tmp_path / "x.gz")
    assert "gzip says EOFError" in str(error.value)


@pytest.mark.parametrize("place", [-6, 10, 40], ids=["checksum", "block header", "values"])
def test_a_corrupt_gzip_file_is_refused(tmp_path: Path, place: int) -> None:
    packed = bytearray(gzip.compress(idx(IMAGES)))
    packed[place] ^= 0xFF
    (tmp_path / "x.gz").write_bytes(packed)
    with pytest.raises(InputError, match=r"is damaged: gzip says .* expected .* found") as caught:
        read_idx(tmp_path / "x.gz")
    said = str(caught.value).replace(str(tmp_path), "")
    assert "0x" not in said  # no checksum of the content, which would let anyone confirm a guess of it


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(InputError, match=r"shape \(20,\), but 3 dimensions.* swapped"):
        open_dataset(Data(source="idx", path=str(tmp_path)))


def test_labels_that_are_not_integers_are_refused(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS.astype(np.float32)))
    with pytest.raises(InputError, match="train labels are float32"):
        open_dataset(Data(source="idx", path=str(tmp_path)))


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:19]))
    with pytest.raises(
        InputError,
        match=r"train columns of "
        + re.escape(str(tmp_path))
        + r" = .*uint8\[20,5,4,1\].*int32\[19\].*differ in length",
    ):
        open_dataset(Data(source="idx", path=str(tmp_path)))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_an_empty_set_is_refused(tmp_path: Path, packed: bool) -> None:
    write_family(tmp_path, test=0, packed=packed)
    with pytest.raises(InputError, match=r"\(test\) = '0 examples'"):
        open_dataset(Data(source="idx", path=str(tmp_path)))
