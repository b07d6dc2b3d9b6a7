"""CIFAR's archives: read in the official format, refused if damaged, and never run as code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifar_archive import dumps, write_archive, write_directory

from dpdist.config import Data
from dpdist.data import Dataset, open_dataset, read_rows
from dpdist.data.cifar import CIFAR10, CIFAR100, Format
from dpdist.errors import InputError

KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def files(kind: Format) -> dict[str, Any]:
    """Return the content of a small archive in the official format, by file name, before pickling."""
    content: dict[str, Any] = {}
    for seed, name in enumerate((*kind.train, kind.test)):
        labels = [(seed + i) % kind.classes for i in range(6)]
        content[name] = {"batch_label": name, "data": pixels(6, seed), kind.labels: labels, "filenames": ["a.png"] * 6}
        if kind is CIFAR100:
            content[name]["coarse_labels"] = [0] * 6
    content[kind.meta] = {kind.names: [f"class {i}" for i in range(kind.classes)], "num_vis": 3072}
    return content


def packed(kind: Format, change: Callable[[dict[str, Any]], None] = lambda content: None) -> dict[str, bytes]:
    content = files(kind)
    change(content)
    return {name: value if isinstance(value, bytes) else dumps(value) for name, value in content.items()}


def opened(source: str, path: Path, **options: Any) -> Dataset:
    return open_dataset(Data(source=source, path=str(path), options=options))


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("form", ["archive", "directory"])
def test_the_official_format_reads_back(tmp_path: Path, source: str, form: str) -> None:
    kind = KINDS[source]
    if form == "archive":
        path = write_archive(tmp_path / "made.tar.gz", kind, packed(kind))
    else:
        path = write_directory(tmp_path / kind.directory, packed(kind))
    dataset = opened(source, path)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (6 * len(kind.train), 6, kind.classes)
    assert dataset.label_names == tuple(f"class {i}" for i in range(kind.classes))
    rows = read_rows(dataset.train, np.arange(len(dataset.train)))
    assert (rows["image"].dtype, rows["label"].dtype) == (np.uint8, np.int32)
    assert rows["image"].shape == (6 * len(kind.train), 32, 32, 3)
    for batch in range(len(kind.train)):  # red, green, blue; each row by row, as documented by the authors
        for row, colour in ((0, 0), (5, 2)):
            expected = pixels(6, batch)[row, 1024 * colour :][:1024].reshape(32, 32)
            np.testing.assert_array_equal(rows["image"][6 * batch + row, :, :, colour], expected)
    np.testing.assert_array_equal(rows["label"][:6], np.arange(6))
    assert read_rows(dataset.test, np.arange(6))["label"].tolist() == [
        (len(kind.train) + i) % kind.classes for i in range(6)
    ]


def test_examples_lie_in_memory_as_they_are_taken(tmp_path: Path) -> None:
    """Otherwise every `take` would first copy all 50,000 images."""
    dataset = opened("cifar10", write_directory(tmp_path / "made", packed(CIFAR10)))
    assert dataset.train.arrays["image"].flags.c_contiguous  # type: ignore[attr-defined]


# The checksum


def test_an_archive_of_the_official_name_must_have_the_published_checksum(tmp_path: Path) -> None:
    path = write_archive(tmp_path / CIFAR10.archive, CIFAR10, packed(CIFAR10))
    with pytest.raises(InputError, match=rf"does not have the MD5 {CIFAR10.md5}.*fetch it again") as caught:
        opened("cifar10", path)
    assert hashlib.md5(path.read_bytes()).hexdigest() not in str(caught.value)  # it would confirm a guess of the data


def test_another_checksum_or_none_may_be_asked_for(tmp_path: Path) -> None:
    path = write_archive(tmp_path / CIFAR10.archive, CIFAR10, packed(CIFAR10))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    assert len(opened("cifar10", path, checksum=None).train) == 30
    assert len(opened("cifar10", path, checksum=md5.upper()).train) == 30
    with pytest.raises(InputError, match="does not have the MD5 0123"):
        opened("cifar10", path, checksum="0123")


def test_an_option_that_the_source_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.options\.coarse = True: cifar10 takes checksum"):
        opened("cifar10", tmp_path, coarse=True)


# What cannot be read


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self) -> Any:
            return (marker.touch, ())

    for hostile in (pickle.dumps(Attack(), protocol=2), b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'x'\ntR."):
        path = tmp_path / str(len(hostile))
        write_directory(path, packed(CIFAR10) | {"data_batch_3": hostile})
        with pytest.raises(InputError, match=r"its data_batch_3 holds no complete pickle \(it names .*, which no file"):
            opened("cifar10", path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["no such archive.tar.gz", "no_such_directory/"])
def test_a_missing_path_is_reported(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such file or directory; name cifar-100-python.tar.gz or the cifar-100-p"):
        opened("cifar100", tmp_path / name)


def test_the_path_is_needed() -> None:
    with pytest.raises(InputError, match=r"data\.path = None.*cifar10 needs the path"):
        open_dataset(Data(source="cifar10"))


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    content = {other: file for other, file in packed(CIFAR10).items() if other != name}
    with pytest.raises(InputError, match=f"has no file {name}; name cifar-10-python.tar.gz or"):
        opened("cifar10", write_directory(tmp_path / "made", content))
    with pytest.raises(InputError, match=f"has no cifar-10-batches-py/{name}; is it cifar-10-python.tar.gz"):
        opened("cifar10", write_archive(tmp_path / "made.tar.gz", CIFAR10, content))


def test_cifar10_opened_as_cifar100_is_noticed(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "made.tar.gz", CIFAR100, packed(CIFAR100))
    with pytest.raises(InputError, match=r"is it cifar-10-python.tar.gz, and complete"):
        opened("cifar10", path)


@pytest.mark.parametrize("keep", [0, 10, 5_000, -20_000, -10])
def test_a_truncated_archive_is_reported(tmp_path: Path, keep: int) -> None:
    path = write_archive(tmp_path / "made.tar.gz", CIFAR10, packed(CIFAR10))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"is no complete \.tar\.gz archive"):
        opened("cifar10", path)


@pytest.mark.parametrize("place", [0, 100, 20_000, -6])
def test_a_corrupt_archive_is_refused(tmp_path: Path, place: int) -> None:
    path = write_archive(tmp_path / "made.tar.gz", CIFAR10, packed(CIFAR10))
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is no complete \.tar\.gz archive"):
        opened("cifar10", path)


def test_a_web_page_in_place_of_the_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.tar.gz").write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"is no complete \.tar\.gz archive"):
        opened("cifar10", tmp_path / "made.tar.gz")


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "made", packed(CIFAR10))
    (path / "data_batch_1").unlink()
    (path / "data_batch_1").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        opened("cifar10", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(test_batch=dumps(content["test_batch"])[:9_000]), "no complete pickle"),
        (lambda content: content.update(test_batch=b""), "no complete pickle"),
        (lambda content: content.update(test_batch=[1, 2]), "a list, not a dict"),
        (lambda content: content["test_batch"].pop("data"), "'data', but NoneType"),
        (
            lambda content: content["test_batch"].update(data=pixels(6, 0)[:, :100]),
            r"3,072 values in 'data', but uint8",
        ),
        (lambda content: content["test_batch"].update(data=pixels(6, 0).astype(np.int32)), "'data', but int32"),
        (lambda content: content["test_batch"].pop("labels"), "no list 'labels' of whole numbers below 10"),
        (lambda content: content["test_batch"].update(labels=[10] * 6), "no list 'labels' of whole numbers below 10"),
        (lambda content: content["test_batch"].update(labels=[-1] * 6), "no list 'labels' of whole numbers below 10"),
        (lambda content: content["test_batch"].update(labels=[0.5] * 6), "no list 'labels' of whole numbers below 10"),
        (lambda content: content["test_batch"].update(labels=[1] * 5), "6 images but 5 labels"),
    ],
    ids=["cut", "empty", "list", "no data", "narrow", "int32", "no labels", "too high", "negative", "float", "too few"],
)
def test_a_batch_of_another_content_is_named_with_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = write_directory(tmp_path / "made", packed(CIFAR10, change))
    with pytest.raises(InputError, match=rf"its test_batch holds .*{message}.*; fetch the archive again"):
        opened("cifar10", path)


def test_names_that_do_not_fit_the_classes_are_refused(tmp_path: Path) -> None:
    path = write_directory(
        tmp_path / "made", packed(CIFAR100, lambda content: content["meta"]["fine_label_names"].pop())
    )
    with pytest.raises(InputError, match="its meta holds no list 'fine_label_names' of 100 names"):
        opened("cifar100", path)
