"""Parquet, Arrow, saved `datasets` and CSV files: what their columns become, and how parts are found."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpdist.config import Data
from dpdist.data import ArraySource, Dataset, open_dataset, read_rows
from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


TABLE = pa.table(
    {
        "pixel_values": [{"bytes": png(image), "path": None} for image in PIXELS],
        "flat": pa.array([[i, i + 1] for i in range(10)], pa.list_(pa.float32(), 2)),
        "deep": [[[i, 0, 1], [2, 3, i]] for i in range(10)],
        "flag": [i % 2 == 0 for i in range(10)],
        "labels": [i % 3 for i in range(10)],
        "name": ["abc"[i % 3] for i in range(10)],
        "ragged": [[0] * i for i in range(10)],
        "gaps": [None if i == 4 else i for i in range(10)],
    }
)
NUMBERS = {"image": "pixel_values", "flat": "flat", "deep": "deep", "flag": "flag", "label": "labels"}


def rows_of(dataset: Dataset, part: str = "train") -> dict[str, np.ndarray]:
    source = getattr(dataset, part)
    return read_rows(source, np.arange(len(source)))


def write_arrow(file: Path, table: pa.Table, *, stream: bool) -> None:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def save(kind: str, path: Path, table: pa.Table) -> str:
    """Write a table in two parts; returns `data.source`."""
    first, second = table.slice(0, 7), table.slice(7)
    path.mkdir()
    if kind == "parquet":
        pq.write_table(first.slice(0, 4), path / "train-00000-of-00002.parquet")
        pq.write_table(first.slice(4), path / "train-00001-of-00002.parquet")
        pq.write_table(second, path / "test-00000-of-00001.parquet")
    elif kind == "folders":
        for part, rows in (("train", first), ("validation", second)):
            (path / part).mkdir()
            pq.write_table(rows, path / part / "0.parquet")
        return "parquet"
    elif kind == "hf":
        # Round trips through the library's own types, so that it writes what it writes.
        saved = {
            part: datasets.Dataset(datasets.table.InMemoryTable(rows))
            for part, rows in (("train", first), ("test", second))
        }
        datasets.DatasetDict(saved).save_to_disk(path)
    else:
        write_arrow(path / "train.arrow", first, stream=kind == "stream")
        write_arrow(path / "test.arrow", second, stream=kind == "stream")
        return "arrow"
    return kind


KINDS = ("parquet", "folders", "hf", "stream", "file")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_lists_and_images_come_back_under_our_names(tmp_path: Path, kind: str) -> None:
    source = save(kind, tmp_path / "data", TABLE)
    dataset = open_dataset(Data(source=source, path=str(tmp_path / "data"), columns=NUMBERS))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (7, 3)
    for part, index in (("train", np.arange(7)), ("test", np.arange(7, 10))):
        rows = rows_of(dataset, part)
        np.testing.assert_array_equal(rows["image"], PIXELS[index])
        np.testing.assert_array_equal(rows["flat"], np.stack([index, index + 1], -1))
        np.testing.assert_array_equal(rows["deep"], np.array([TABLE["deep"][int(i)].as_py() for i in index]))
        np.testing.assert_array_equal(rows["flag"], index % 2 == 0)
        np.testing.assert_array_equal(rows["label"], index % 3)
        assert [rows[name].dtype for name in ("image", "flat", "deep", "label")] == [
            np.uint8,
            np.float32,
            np.int32,
            np.int32,
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_classes_are_numbered_by_the_public_list(tmp_path: Path, kind: str) -> None:
    source = save(kind, tmp_path / "data", TABLE)
    columns = {"x": "flat", "label": "name"}
    dataset = open_dataset(
        Data(source=source, path=str(tmp_path / "data"), columns=columns, options={"classes": ["c", "a", "b", "z"]})
    )
    assert (dataset.classes, dataset.label_names) == (4, ("c", "a", "b", "z"))
    assert rows_of(dataset)["label"].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert isinstance(dataset.train, ArraySource)  # so all of it is fingerprinted
    with pytest.raises(
        InputError, match=r"column 'name' .*the names of the classes are public .*data\.options\.classes"
    ):
        open_dataset(Data(source=source, path=str(tmp_path / "data"), columns=columns))
    with pytest.raises(InputError, match=r"data\.options\.classes = \['a', 'b'\]: some labels are none") as caught:
        open_dataset(Data(source=source, path=str(tmp_path / "data"), columns=columns, options={"classes": ["a", "b"]}))
    assert "'c', of row 2" in str(caught.value.__cause__)


@pytest.mark.parametrize("column", ["name", "ragged", "gaps"])
def test_columns_that_no_model_takes_are_refused_unless_left_out(tmp_path: Path, column: str) -> None:
    pq.write_table(TABLE.select(["flat", column]), tmp_path / "x.parquet")
    what = {"name": "text", "ragged": "lists of differing lengths", "gaps": "int64 with missing values"}[column]
    with pytest.raises(InputError, match=rf"column 2 of 2 of .* = '{what}.*: a model takes .*data\.columns"):
        open_dataset(Data(source="parquet", path=str(tmp_path / "x.parquet")))
    dataset = open_dataset(Data(source="parquet", path=str(tmp_path / "x.parquet"), columns={"x": "flat"}))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (8, 2)


@pytest.mark.parametrize("saved", ["hf", "parquet"])
def test_what_datasets_writes_brings_its_class_names_and_images(tmp_path: Path, saved: str) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "grid": datasets.Array2D((2, 2), "float32"),
        }
    )
    columns = {"img": [Image.fromarray(image) for image in PIXELS], "label": [0, 1] * 5, "grid": [np.eye(2)] * 10}
    whole = datasets.Dataset.from_dict(columns, features=features)
    if saved == "hf":
        whole.save_to_disk(tmp_path / "data")
    else:
        whole.to_parquet(tmp_path / "data")
    dataset = open_dataset(Data(source=saved, path=str(tmp_path / "data"), test_fraction=0.1))
    assert (dataset.classes, dataset.label_names) == (2, ("no", "yes"))
    assert sorted(rows_of(dataset)) == ["grid", "img", "label"]
    assert rows_of(dataset)["grid"].shape == (9, 2, 2)
    found = {image.tobytes() for image in rows_of(dataset)["img"]}
    assert len(found) == 9
    assert found < {image.tobytes() for image in PIXELS}


def test_images_may_lie_in_files_beside_the_table(tmp_path: Path) -> None:
    for index, image in enumerate(PIXELS):
        (tmp_path / f"{index}.png").write_bytes(png(image))
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": f"{i}.png"} for i in range(10)]}), tmp_path / "x.parquet"
    )
    dataset = open_dataset(Data(source="parquet", path=str(tmp_path / "x.parquet"), test_fraction=0.1))
    assert {image.tobytes() for image in rows_of(dataset)["image"]} < {image.tobytes() for image in PIXELS}


def test_a_damaged_image_in_a_table_is_refused_and_the_cause_says_which(tmp_path: Path) -> None:
    images = [png(image) for image in PIXELS]
    images[5] = images[5][:40]
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    dataset = open_dataset(Data(source="parquet", path=str(tmp_path / "train.parquet"), test_fraction=0.1))
    with pytest.raises(InputError, match="an image that cannot be decoded") as caught:
        rows_of(dataset)
    assert isinstance(caught.value.__cause__, BadRecordError)
    assert "example 5, column image" in str(caught.value.__cause__)


def test_files_without_a_part_beside_files_with_one_are_refused(tmp_path: Path) -> None:
    save("parquet", tmp_path / "data", TABLE)
    pq.write_table(TABLE, tmp_path / "data" / "more.parquet")
    with pytest.raises(InputError, match=r"data\.path = .*1 of its 4 files have no part in their name"):
        open_dataset(Data(source="parquet", path=str(tmp_path / "data"), columns=NUMBERS))


def test_test_wins_over_validation_which_may_be_asked_for(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("test", 2), ("validation", 3)):
        pq.write_table(TABLE.select(["flat"]).slice(0, count), tmp_path / f"{part}.parquet")
    for options, count in (({}, 2), ({"test": "validation"}, 3)):
        dataset = open_dataset(Data(source="parquet", path=str(tmp_path), options=options))
        assert dataset.test is not None
        assert (len(dataset.train), len(dataset.test)) == (5, count)


def test_files_of_a_part_with_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(TABLE.select(["flat"]), tmp_path / "a.parquet")
    pq.write_table(TABLE.select(["flag"]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"file 2 of 2, in order of name: has other columns, or of other types"):
        open_dataset(Data(source="parquet", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "hf"])
def test_damaged_files_are_refused_without_quoting_them(tmp_path: Path, kind: str) -> None:
    source = save({"arrow": "stream"}.get(kind, kind), tmp_path / "data", TABLE)
    for file in [*tmp_path.rglob("*.parquet"), *tmp_path.rglob("*.arrow")]:
        file.write_bytes(b"Alice" * 20)
    with pytest.raises(InputError, match=r"data\.path = .*cannot be read") as caught:
        open_dataset(Data(source=source, path=str(tmp_path / "data"), columns=NUMBERS))
    assert "Alice" not in str(caught.value)


IRIS = "sepal,petal,species\n5.1,1,setosa\n4.9,2,virginica\n6,3,setosa\n5,4,virginica\n5,5,virginica\n"


def write_csv(tmp_path: Path, text: str, name: str = "iris.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_csv_file_gives_features_and_the_label_in_one_config(tmp_path: Path) -> None:
    dataset = open_dataset(
        Data(
            source="csv",
            path=write_csv(tmp_path, IRIS),
            columns={"label": "species"},
            options={"classes": ["setosa", "virginica"]},
        )
    )
    rows, test = rows_of(dataset), rows_of(dataset, "test")
    assert rows["features"].dtype == np.float32
    whole = np.concatenate([rows["features"], test["features"]])
    np.testing.assert_allclose(np.sort(whole[:, 1]), [4.9, 5, 5, 5.1, 6], rtol=1e-6)  # in order of name: petal first
    assert sorted(whole[:, 0]) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(rows["label"], [int(petal in (2, 4, 5)) for petal in rows["features"][:, 0]])


def test_a_csv_file_of_numbers_needs_no_options(tmp_path: Path) -> None:
    text = "a;b;target\n1;2;0.5\n3;4;1.5\n5;6;2.5\n"
    dataset = open_dataset(Data(source="csv", path=write_csv(tmp_path, text), options={"delimiter": ";"}))
    rows = rows_of(dataset)
    assert {name: (values.shape, values.dtype) for name, values in rows.items()} == {
        "features": ((2, 2), np.float32),
        "target": ((2,), np.float32),
    }


def test_columns_of_a_csv_file_can_be_chosen_and_stacked(tmp_path: Path) -> None:
    text = "a,b,c,label\n1,2,3,0\n4,5,6,1\n7,8,9,0\n"
    columns = {"image": ["c", "a"], "label": "label"}
    rows = rows_of(open_dataset(Data(source="csv", path=write_csv(tmp_path, text), columns=columns)))
    assert sorted(rows) == ["image", "label"]
    np.testing.assert_array_equal(rows["image"][:, 0], rows["image"][:, 1] + 2)


def test_gzipped_and_tab_separated_parts_of_csv(tmp_path: Path) -> None:
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"a\tlabel\n1\t0\n2\t1\n"))
    (tmp_path / "test.tsv.gz").write_bytes(gzip.compress(b"label\ta\n1\t3\n"))
    dataset = open_dataset(Data(source="csv", path=str(tmp_path)))
    assert rows_of(dataset)["features"].tolist() == [[1], [2]]
    assert rows_of(dataset, "test")["features"].tolist() == [[3]]  # by name, not by place


def test_the_column_of_the_unit_is_no_feature(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,who,label\n1,7,0\n2,7,1\n3,8,0\n")
    (tmp_path / "test.csv").write_text("a,who,label\n5,9,0\n")
    dataset = open_dataset(Data(source="csv", path=str(tmp_path), unit="who", records_per_unit=2))
    rows = read_rows(dataset.train, np.arange(2))
    assert rows["features"].tolist() == [[[1], [2]], [[3], [3]]]
    assert rows["unit_mask"].tolist() == [[True, True], [True, False]]
    assert rows_of(dataset, "test")["features"].tolist() == [[5]]


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("a,label\n1,0\n2\n", "data.path", "has lines of another number of cells than the 2"),
        ("1,0\n2,1\n", "data.path", "its first line has to name the columns"),
        ("a,a\n1,0\n", "data.path", "its first line has to name the columns, each once"),
        ("", "data.path", "its first line has to name the columns"),
        ("a,label\n1,0\n,1\n", "column 1 of 2 of", "numbers, with empty cells"),
        ("a,label\n1,0\nnan,1\n", "column 1 of 2 of", r"some of them missing \(NaN\)"),
        ("city,label\nRome,0\nBern,1\n", "column 1 of 2 of", "text.*data.columns"),
        ('a,label\n"1,0\n', "data.path", "is damaged, or no CSV file"),
    ],
)
def test_csv_files_that_say_no_numbers_are_refused(tmp_path: Path, text: str, field: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{field}.*{message}"):
        open_dataset(Data(source="csv", path=write_csv(tmp_path, text)))


def test_a_file_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("größe,label\n1,0\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8; save it as UTF-8"):
        open_dataset(Data(source="csv", path=str(tmp_path / "x.csv")))


@pytest.mark.parametrize("source", ["parquet", "arrow", "csv", "hf", "text"])
def test_a_path_where_nothing_is_is_refused(tmp_path: Path, source: str, tokenizer_file: str) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer_file, "length": 4} if source == "text" else {}
    with pytest.raises(InputError, match=r"data\.path = .*no such (file or )?directory"):
        open_dataset(Data(source=source, path=str(tmp_path / "nowhere"), options=options))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.path = .*(has no .* files; name|no directory that `save_to_disk`)"):
        open_dataset(Data(source=source, path=str(tmp_path / "empty"), options=options))
    with pytest.raises(InputError, match=rf"data\.path = None: the source {source} needs the path"):
        open_dataset(Data(source=source, options=options))
