"""Columns in .npy and .npz files: found by name, memory-mapped, never unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpdist.config import Data
from dpdist.data import ArraySource, Dataset, Subset, open_dataset
from dpdist.errors import InputError

TRAIN: dict[str, np.ndarray] = {"tokens": np.arange(60, dtype=np.int32).reshape(20, 3), "label": np.arange(20) % 2}
TEST = {name: values[:5] for name, values in TRAIN.items()}


def write(path: Path, train: dict[str, np.ndarray], test: dict[str, np.ndarray], *, archive: bool) -> Path:
    columns = {f"train_{k}": v for k, v in train.items()} | {f"test_{k}": v for k, v in test.items()}
    if archive:
        np.savez(path / "data.npz", **columns)  # type: ignore[arg-type]
        return path / "data.npz"
    for name, values in columns.items():
        np.save(path / f"{name}.npy", values)
    return path


def open_npy(path: Path) -> Dataset:
    return open_dataset(Data(source="npy", path=str(path)))


@pytest.fixture(params=[False, True], ids=["directory", "npz"])
def archive(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_columns_keep_their_names_dtypes_and_rows(tmp_path: Path, archive: bool) -> None:
    dataset = open_npy(write(tmp_path, TRAIN, TEST, archive=archive))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (20, 5, None)
    example = dataset.train[7]
    assert set(example) == {"tokens", "label"}
    assert example["tokens"].tolist() == [21, 22, 23]
    assert example["label"] == 1
    assert (example["tokens"].dtype, example["label"].dtype) == (np.int32, np.int64)


def test_a_directory_is_memory_mapped(tmp_path: Path) -> None:
    source = open_npy(write(tmp_path, TRAIN, TEST, archive=False)).train
    assert isinstance(source, ArraySource)
    assert isinstance(source.arrays["tokens"].base, np.memmap)


def test_without_test_columns_a_fraction_is_held_out(tmp_path: Path, archive: bool) -> None:
    dataset = open_npy(write(tmp_path, TRAIN, {}, archive=archive))
    assert isinstance(dataset.train, Subset)
    assert isinstance(dataset.test, Subset)
    first_tokens = [source[i]["tokens"][0] // 3 for source in (dataset.train, dataset.test) for i in range(len(source))]
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert sorted(first_tokens) == list(range(20))


def test_without_train_columns_the_names_found_are_reported(tmp_path: Path, archive: bool) -> None:
    path = write(tmp_path, {}, TEST, archive=archive)
    with pytest.raises(InputError, match=r"train_<column>.*found 2 of other names"):
        open_npy(path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing"):
        open_npy(tmp_path)


def test_a_missing_path_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere'.*no such file or directory"):
        open_npy(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"data\.path = None"):
        open_dataset(Data(source="npy"))


def test_python_objects_are_refused_unopened(tmp_path: Path, archive: bool) -> None:
    path = write(tmp_path, {"label": np.array([{}, {}], object)}, {}, archive=archive)
    with pytest.raises(InputError, match=r"cannot be read \(.*Python objects"):
        open_npy(path)


def test_a_pickle_named_npy_is_refused_unopened(tmp_path: Path) -> None:
    write(tmp_path, TRAIN, {}, archive=False)
    (tmp_path / "train_label.npy").write_bytes(b"cos\nabort\n(tR.")  # would end the process if unpickled
    with pytest.raises(InputError, match=r"train_label\.npy'.*cannot be read") as caught:
        open_npy(tmp_path)
    assert "abort" not in str(caught.value).replace(str(tmp_path), "")  # nor is a file that is no array quoted


@pytest.mark.parametrize("size", [0, 40, 200], ids=["empty", "header cut", "values cut"])
def test_a_damaged_npy_file_is_reported(tmp_path: Path, size: int) -> None:
    write(tmp_path, TRAIN, {}, archive=False)
    file = tmp_path / "train_tokens.npy"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"train_tokens\.npy'.*cannot be read"):
        open_npy(tmp_path)


def test_a_damaged_npz_file_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, TRAIN, {}, archive=True)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:200])
    with pytest.raises(InputError, match=r"neither a directory nor a complete \.npz"):
        open_npy(path)
    content[content.index(TRAIN["tokens"].tobytes())] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read \(damaged\)"):
        open_npy(path)


def test_a_damaged_compressed_npz_file_is_reported(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", train_label=np.zeros(1000))
    content = bytearray((tmp_path / "data.npz").read_bytes())
    name_end = content.index(b"train_label.npy") + len("train_label.npy")
    content[name_end + 20 : name_end + 60] = b"\xff" * 40
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read \(damaged\)"):
        open_npy(tmp_path / "data.npz")


def test_columns_of_differing_lengths_are_refused(tmp_path: Path, archive: bool) -> None:
    path = write(tmp_path, TRAIN | {"label": np.zeros(19, int)}, {}, archive=archive)
    with pytest.raises(InputError, match=r"train columns of .*int64\[19\].*differ in length"):
        open_npy(path)


@pytest.mark.parametrize(
    "test", [{"label": TEST["label"]}, TEST | {"tokens": TEST["tokens"][:, :2]}], ids=["other names", "other row shape"]
)
def test_test_columns_must_match_the_train_columns(tmp_path: Path, archive: bool, test: dict[str, np.ndarray]) -> None:
    path = write(tmp_path, TRAIN, test, archive=archive)
    with pytest.raises(InputError, match=r"test columns of .* the same names"):
        open_npy(path)


def test_an_empty_train_set_is_refused(tmp_path: Path, archive: bool) -> None:
    path = write(tmp_path, {name: values[:0] for name, values in TRAIN.items()}, TEST, archive=archive)
    with pytest.raises(InputError, match=r"\(train\) = '0 examples'"):
        open_npy(path)
