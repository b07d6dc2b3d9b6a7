"""What people get wrong about data, each answered in one line with the field, the value and what to do."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpdist.config import Data, from_dict
from dpdist.data import Dataset, open_dataset, read_rows
from dpdist.data.parts import choose_parts
from dpdist.errors import InputError


def images(root: Path, *files: str) -> str:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / file)
    return str(root)


def parquet(root: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), root / "rows.parquet")
    return str(root / "rows.parquet")


def csv(root: Path, text: str) -> str:
    (root / "rows.csv").write_text(text)
    return str(root / "rows.csv")


#: What was meant, the `data` section by a directory to write into, and the error's field, value and remedy.
WRONG: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str, str]] = {
    "a misspelt source": (
        lambda root: {"source": "imagefolder", "path": str(root)},
        "data.source",
        "'imagefolder'",
        "did you mean image_folder?",
    ),
    "the folder above the parts": (
        lambda root: {
            "source": "image_folder",
            "path": str(Path(images(root / "x" / "y", "a/1.png", "b/2.png")).parent),
        },
        "data.path",
        "x'",
        "holds only one folder; it needs one for each of at least 2 classes.",
    ),
    "a size as text": (
        lambda root: {
            "source": "image_folder",
            "path": images(root, "a/1.png", "b/1.png"),
            "options": {"size": "224x224"},
        },
        "data.options.size",
        "'224x224'",
        "give [height, width] in pixels, or one number for both.",
    ),
    "a misspelt unit, beside its column of names": (
        lambda root: {
            "source": "csv",
            "path": csv(root, "a,target,patient\n1,0,ann\n2,1,bob\n"),
            "unit": "patent",
            "records_per_unit": 2,
        },
        "data.unit",
        "'patent'",
        "there is no such column",
    ),
    "a unit that data.columns leaves out": (
        lambda root: {
            "source": "csv",
            "path": csv(root, "a,target,patient\n1,0,ann\n2,1,bob\n"),
            "columns": {"features": ["a"], "target": "target"},
            "unit": "patient",
            "records_per_unit": 2,
        },
        "data.unit",
        "'patient'",
        "is none of data.columns; add it there: {patient: ITS_NAME}.",
    ),
    "an option of another source": (
        lambda root: {"source": "csv", "path": csv(root, "a,label\n1,0\n"), "options": {"size": 8}},
        "data.options.size",
        "8",
        "csv takes classes, delimiter, train, test",
    ),
    "the names of classes of text labels left out": (
        lambda root: {"source": "csv", "path": csv(root, "a,label\n1,ham\n2,spam\n")},
        "column 'label' of",
        "'text'",
        "list them in data.options.classes",
    ),
    "a class that the list lacks": (
        lambda root: {
            "source": "csv",
            "path": csv(root, "a,label\n1,ham\n2,Spam\n"),
            "options": {"classes": ["ham", "spam"]},
        },
        "data.options.classes",
        "['ham', 'spam']",
        "list all classes, spelt as in the data",
    ),
    "a class listed twice": (
        lambda root: {"source": "csv", "path": csv(root, "a,label\n1,x\n"), "options": {"classes": ["x", "x"]}},
        "data.options.classes",
        "['x', 'x']",
        "list the names of the classes, each once",
    ),
    "a column of another name": (
        lambda root: {"source": "parquet", "path": parquet(root, pixels=[1, 2]), "columns": {"image": "pixel"}},
        "data.columns.image",
        "'pixel'",
        "which has 1; `dpdist data describe CONFIG` says which.",
    ),
    "a column of ids kept": (
        lambda root: {"source": "parquet", "path": parquet(root, x=[1, 2], id=["u1", "u2"])},
        "column 2 of 2 of",
        "'text'",
        "name the columns to use in data.columns",
    ),
    "columns that are a name": (
        lambda root: {"source": "parquet", "path": parquet(root, x=[1, 2]), "columns": "x"},
        "data.columns",
        "'x'",
        "give dict or null",
    ),
    "vectors to be stacked": (
        lambda root: {
            "source": "parquet",
            "path": parquet(root, x=[[1, 2], [3, 4]], y=[1, 2]),
            "columns": {"features": ["x", "y"]},
        },
        "data.columns.features",
        "'2 columns'",
        "stack columns of one number each; these have the shapes [2], []",
    ),
    "Parquet files named as Arrow": (
        lambda root: {"source": "hf", "path": str(Path(parquet(root, x=[1])).parent)},
        "data.path",
        "",
        "for Parquet files give data.source=parquet",
    ),
    "a path for the digits": (
        lambda root: {"source": "digits", "path": str(root)},
        "data.path",
        "",
        "digits reads no path; leave it out",
    ),
    "text without its tokenizer": (
        lambda root: {"source": "text", "path": str(root), "options": {"length": 8}},
        "data.options.tokenizer",
        "None",
        "name a tokenizer.json on disk",
    ),
    "a user's label as a feature and no column of that name": (
        lambda root: {"source": "csv", "path": csv(root, "a,y\n1,0\n2,1\n"), "columns": {"label": "Y_true"}},
        "data.columns.label",
        "'Y_true'",
        "which has 2; `dpdist data describe CONFIG` says which.",
    ),
}


def opened(section: dict[str, Any]) -> Dataset:
    config = from_dict({"data": section, "privacy": {"enabled": False}, "training": {"steps": 1}})
    return open_dataset(config)


@pytest.mark.parametrize("meant", WRONG)
def test_a_wrong_input_is_one_line_with_field_value_and_remedy(tmp_path: Path, meant: str) -> None:
    section, field, value, remedy = WRONG[meant]
    given = section(tmp_path)
    with pytest.raises(InputError) as caught:
        opened(given)
    message = str(caught.value)
    assert message.startswith(field)
    assert value in message.partition(": ")[0]
    assert remedy in message
    assert "\n" not in message


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, extra, section in (
        ("PIL.Image", "images", {"source": "image_folder", "path": images(tmp_path, "a/1.png", "b/1.png")}),
        ("pyarrow", "parquet", {"source": "parquet", "path": parquet(tmp_path, x=[1, 2])}),
        ("datasets", "hf", {"source": "hf", "path": str(tmp_path)}),
        ("tokenizers", "text", {"source": "text", "path": str(tmp_path), "options": {"tokenizer": "t", "length": 1}}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"data\.source = .*: needs .*pip install 'dpdist\[{extra}\]'"):
            opened(section)
        monkeypatch.undo()


# What a hostile reader has found


def test_class_names_are_given_their_own_numbers_whatever_the_labels_look_like(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,label\n1,0\n2,1\n3,1\n")
    (tmp_path / "test.csv").write_text("a,label\n1,1\n2,0\n")
    found = open_dataset(Data(source="csv", path=str(tmp_path), options={"classes": [1, 0]}))
    assert found.label_names == ("1", "0")
    assert read_rows(found.train, np.arange(3))["label"].tolist() == [1, 0, 0]
    named = open_dataset(Data(source="csv", path=str(tmp_path), options={"classes": ["ham", "spam"]}))
    assert read_rows(named.train, np.arange(3))["label"].tolist() == [0, 1, 1]  # places of names, as they are


def test_a_file_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = "a,label\n1,0\n2,1\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(InputError, match="half the protection"):
        open_dataset(Data(source="csv", path=str(tmp_path)))


def test_a_part_is_the_one_of_that_very_name() -> None:
    found = {"train_noisy": 1, "train": 2, "test_unlabelled": 3, "test": 4}
    assert choose_parts(found, train=None, test=None, where="here") == (2, 4)


def test_a_number_that_would_become_infinite_is_refused_in_a_stack_too(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,label\n1,1e300,0\n2,3,1\n")
    with pytest.raises(InputError, match="do not fit into float32"):
        open_dataset(Data(source="csv", path=str(tmp_path)))


def test_features_do_not_depend_on_the_order_of_a_files_columns(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("weight,age,label\n70,30,0\n80,40,1\n")
    (tmp_path / "test.csv").write_text("age,label,weight\n31,0,71\n41,1,81\n")
    found = open_dataset(Data(source="csv", path=str(tmp_path)))
    assert read_rows(found.train, np.arange(2))["features"].tolist() == [[30, 70], [40, 80]]
    assert found.test is not None
    assert read_rows(found.test, np.arange(2))["features"].tolist() == [[31, 71], [41, 81]]
