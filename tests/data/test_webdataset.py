"""Records as files in tar archives: columns by ending, parts by name, and archives that would lose records."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpdist.config import Data
from dpdist.data import Dataset, fingerprint, open_dataset, read_rows
from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError

Files = dict[str, bytes]


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)


def encoded(array: np.ndarray, form: str = "png") -> bytes:
    into = io.BytesIO()
    np.save(into, array) if form == "npy" else Image.fromarray(array).save(into, form)
    return into.getvalue()


def shard(path: Path, files: Files, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def records(*numbers: int) -> Files:
    return {
        name: content
        for n in numbers
        for name, content in (
            (f"{n:04}.png", encoded(pixels(n))),
            (f"{n:04}.cls", b"%d\n" % (n % 3)),
        )
    }


def opened(path: Path, columns: dict[str, Any] | None = None, unit: str | None = None, **options: Any) -> Dataset:
    return open_dataset(
        Data(
            source="webdataset",
            path=str(path),
            columns=columns,
            unit=unit,
            records_per_unit=2 if unit else None,
            options=options,
        )
    )


def refused(path: Path, message: str, private: str = "", **settings: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(path, **settings)
    chain: BaseException | None = caught.value
    said = []
    while chain is not None:
        said.append(str(chain))
        chain = chain.__cause__
    assert private in " ".join(said[1:])
    assert private == "" or private not in said[0].replace(str(path), "")  # the path is public, and has random letters


def test_images_and_classes_come_back_as_written_over_all_shards_in_any_order(tmp_path: Path) -> None:
    shard(tmp_path / "train-000000.tar", records(1, 2, 3))
    shard(tmp_path / "train-000001.tar", records(4, 5), tarfile.PAX_FORMAT)
    shard(tmp_path / "val-000000.tar", records(6, 7))
    dataset = opened(tmp_path)
    assert dataset.test is not None
    rows = read_rows(dataset.train, np.array([4, 0, 3]))
    np.testing.assert_array_equal(rows["image"], np.stack([pixels(n) for n in (5, 1, 4)]))
    assert (rows["image"].dtype, rows["label"].tolist()) == (np.uint8, [2, 1, 1])
    assert (len(dataset.train), len(dataset.test)) == (5, 2)
    np.testing.assert_array_equal(read_rows(dataset.test, np.array([1]))["image"][0], pixels(7))


def test_a_shard_alone_is_split_and_images_may_be_of_several_forms(tmp_path: Path) -> None:
    files = records(*range(9)) | {"dir/a.b/10.jpeg": encoded(pixels(10), "jpeg"), "dir/a.b/10.cls": b"1"}
    dataset = opened(shard(tmp_path / "all.tar", files), mode="grayscale", size=[2, 2])
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    assert read_rows(dataset.train, np.arange(8))["image"].shape == (8, 2, 2, 1)


def test_keys_of_json_arrays_and_longer_endings_are_columns(tmp_path: Path) -> None:
    files: Files = {}
    for n in range(4):
        files[f"{n}.mask.png"] = encoded(pixels(n))
        files[f"{n}.embedding.npy"] = encoded(np.full((2, 3), n, np.float32), "npy")
        files[f"{n}.json"] = json.dumps({"age": n + 0.5, "kind": "ab"[n % 2], "who": f"p{n // 2}"}).encode()
        files[f"{n}.flac"] = b"no column of ours"
    columns = {"image": "mask", "features": ["age"], "label": "kind", "x": "embedding"}
    path = shard(tmp_path / "all.tar", files)
    train = opened(path, columns, classes=["a", "b"]).train
    rows = read_rows(train, np.arange(len(train)))
    order = rows["x"][:, 0, 0].astype(int)
    np.testing.assert_array_equal(rows["features"], order[:, None] + np.float32(0.5))
    np.testing.assert_array_equal(rows["label"], order % 2)
    np.testing.assert_array_equal(rows["image"], np.stack([pixels(n) for n in order]))
    by_user = opened(path, columns | {"who": "who"}, unit="who", classes=["a", "b"])
    assert by_user.test is not None
    assert (len(by_user.train), len(by_user.test)) == (1, 2)  # one user of two, and two records of the other
    refused(path, "files of an ending that is not known.: a model takes whole columns", columns={"image": "flac"})
    refused(path, r"data.columns.*'jpg'", columns={"image": "jpg"})


def test_the_names_of_classes_may_stand_in_cls_files(tmp_path: Path) -> None:
    names = ["cat", "dog"]
    files = {
        name: content
        for n in range(4)
        for name, content in ((f"{n}.cls", names[n % 2].encode()), (f"{n}.x.npy", encoded(np.float32(n), "npy")))
    }
    path = shard(tmp_path / "all.tar", files)
    dataset = opened(path, classes=names)
    assert (dataset.classes, dataset.label_names) == (2, ("cat", "dog"))
    rows = read_rows(dataset.train, np.arange(3))
    np.testing.assert_array_equal(rows["label"], rows["x"].astype(int) % 2)
    refused(path, "data.options.classes, such as")


def test_what_would_be_lost_in_silence_is_refused(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", records(*range(6))).read_bytes()
    end = whole.rindex(b"2\n" + bytes(100)) + 512
    path = tmp_path / "cut" / "train.tar"
    path.parent.mkdir()
    for content in (
        whole[: end - 1024],  # within the last file
        whole[:end],  # before the zeros that end it
        whole[: end - 1536] + b"x" * 1536 + whole[end:],  # a header in the middle
        whole.rstrip(b"\0") + bytes(2048) + whole,  # two archives, one after the other
        b"PK\3\4" + whole,
        b"",
    ):
        path.write_bytes(content)
        refused(path, r"cannot be read as a tar archive \(damaged, cut off or compressed\)")
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as archive:
        archive.add(whole_path := tmp_path / "whole.tar", "0.png")
    whole_path.unlink()
    path.unlink()
    refused(tmp_path, "damaged, cut off or compressed")


@pytest.mark.parametrize(
    ("files", "message", "private"),
    [
        (records(1, 2) | {"secret.png": b""}, "records of other files than the first", "secret"),
        (records(1) | {"0001.jpg": b""}, "two files for one column of a record", "0001.jpg"),
        (records(1) | {"secret": b""}, "a file without an ending", "secret"),
        ({"1.json": b'{"label": 1}', "1.cls": b"1"}, "a key that is the column of another file", "label"),
        ({"secret.json": b"{"}, "a file of a shard.*cannot be read", "secret"),
        ({"1.json": b"[1]"}, "something else than one object", ""),
        ({"1.json": b'{"secret": 1}', "2.json": b'{"b": 1}'}, "missing values", "secret"),
        ({"1.x.npy": b"", "2.x.npy": encoded(np.zeros(2), "npy")}, "a file of a shard.*cannot be read", "1.x.npy"),
        ({"1.x.npy": encoded(np.zeros(3), "npy"), "2.x.npy": encoded(np.zeros(2), "npy")}, "differing shapes", "x"),
        ({".hidden.png": b""}, "has no records", ""),
    ],
)
def test_wrong_records(files: Files, message: str, private: str, tmp_path: Path) -> None:
    refused(shard(tmp_path / "all.tar", files), message, private)


def test_shards_of_other_records_and_links_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", records(1))
    path = shard(tmp_path / "train-1.tar", {"2.cls": b"1"})
    refused(tmp_path, "file 2 of 2, in order of name: has records of other files", "train-1.tar")
    path.unlink()
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(link)
    refused(tmp_path, "file 2 of 2.*holds a link", "2.png")


def test_a_damaged_image_is_named_by_shard_and_file_in_private_alone(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", records(1))
    shard(tmp_path / "train-1.tar", records(2) | {"who.png": b"no image", "who.cls": b"1"})
    shard(tmp_path / "test.tar", records(3))
    train = opened(tmp_path).train
    with pytest.raises(InputError, match="an image that cannot be decoded") as caught:
        read_rows(train, np.array([2]))
    assert isinstance(caught.value.__cause__, BadRecordError)
    assert "who.png of train-1.tar" in str(caught.value.__cause__)
    assert "who" not in str(caught.value).replace(str(tmp_path), "")


def test_another_record_is_another_fingerprint(tmp_path: Path) -> None:
    shard(tmp_path / "test.tar", records(9))

    def written(files: Files) -> bytes:
        shard(tmp_path / "train.tar", files)
        return fingerprint(opened(tmp_path).train)

    first = written(records(*range(8)))
    assert written(records(*range(8))) == first
    assert written(records(*range(8)) | {"0003.png": encoded(pixels(9))}) != first
