"""Data of one's own as it is: whatever people hold in Python is told by its type, and split or paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import dpdist
from dpdist.config import Config, Data, Privacy, Training
from dpdist.data import ArraySource, Dataset, Subset, TakeSource, open_dataset, read_rows
from dpdist.data.columns import pick
from dpdist.errors import InputError

FEATURES = np.arange(40, dtype=np.float32).reshape(20, 2)
LABELS = np.arange(20) % 3
COLUMNS = {"features": FEATURES, "label": LABELS}
PYTHON = Data(source="python")


class Items:
    """A torch-style map dataset; what it also has under the name `take` is not what a `TakeSource` has."""

    def __init__(self, as_tuple: bool = False) -> None:
        self.as_tuple = as_tuple

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        example = {"features": FEATURES[index], "label": int(LABELS[index])}
        return tuple(example.values()) if self.as_tuple else example

    def take(self, count: int) -> Any:
        raise AssertionError("not ours")


def given(kind: str) -> Any:
    if kind == "data frame":
        return pd.DataFrame({"features": list(FEATURES), "label": LABELS})
    return {
        "arrays": COLUMNS,
        "ours": ArraySource(COLUMNS),
        "arrow": pa.table({"features": list(FEATURES), "label": LABELS}),
        "datasets": datasets.Dataset.from_dict({"features": FEATURES.tolist(), "label": LABELS}),
        "indexed": datasets.Dataset.from_dict({"features": FEATURES[::-1].tolist(), "label": LABELS[::-1]}).select(
            range(19, -1, -1)
        ),
        "torch style": Items(),
        "list": [Items()[i] for i in range(20)],
    }[kind]


KINDS = ("arrays", "ours", "arrow", "datasets", "indexed", "data frame", "torch style", "list")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_examples(kind: str) -> None:
    dataset = open_dataset(PYTHON, (given(kind), given("ours")))
    for indices in (np.array([3, 1, 17]), np.array([], np.int64)):
        rows = read_rows(dataset.train, indices)
        np.testing.assert_array_equal(rows["features"], FEATURES[indices])
        np.testing.assert_array_equal(rows["label"], LABELS[indices])
    assert dataset.test is not None
    assert len(dataset.test) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_one_set_is_split_as_a_built_in_source_is(kind: str) -> None:
    dataset = open_dataset(PYTHON, given(kind))
    assert isinstance(dataset.train, Subset)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (16, 4)


def test_take_counts_only_where_the_type_says_so() -> None:
    class Quick(TakeSource):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read one by one")

        def take(self, indices: np.ndarray) -> Any:
            return {"label": indices * 10}

    assert read_rows(Quick(), np.array([3]))["label"].tolist() == [30]
    assert read_rows(Items(), np.array([3]))["label"].tolist() == [0]


def test_columns_are_renamed_stacked_and_left_out_for_every_kind() -> None:
    frame = pd.DataFrame({"a": LABELS, "b": FEATURES[:, 0], "who": ["x"] * 20, "y": LABELS})
    columns = {"features": ["b", "a"], "label": "y"}
    rows = read_rows(open_dataset(Data(source="python", columns=columns), (frame, None)).train, np.arange(20))
    np.testing.assert_array_equal(rows["features"], np.stack([FEATURES[:, 0], LABELS], -1))
    assert sorted(rows) == ["features", "label"]
    renamed = {"x": "features", "label": "label"}
    for kind in KINDS:
        source = open_dataset(Data(source="python", columns=renamed), (given(kind), None)).train
        np.testing.assert_array_equal(read_rows(source, np.arange(20))["x"], FEATURES)
    for columns in (renamed, {"x": "features"}):
        subset = pick(Subset(ArraySource(COLUMNS), np.arange(5, 9)), columns, "mine")
        assert isinstance(subset, Subset)
        assert sorted(read_rows(subset, np.arange(4))) == sorted(columns)


@pytest.mark.parametrize("kind", KINDS)
def test_one_set_is_split_by_whole_units(kind: str) -> None:
    dataset = open_dataset(Data(source="python", unit="label", records_per_unit=2, test_fraction=0.3), given(kind))
    assert dataset.test is not None
    assert len(dataset.train) == 2  # two labels of three are units to train on
    left = {tuple(row) for row in read_rows(dataset.test, np.arange(len(dataset.test)))["features"].tolist()}
    labels = {int(LABELS[int(row[0]) // 2]) for row in left}
    assert len(labels) == 1
    assert len(left) == (labels.pop() == LABELS).sum()


def test_places_in_a_tuple_are_named_by_number() -> None:
    source = open_dataset(Data(source="python", columns={"x": 0, "label": 1}), (Items(as_tuple=True), None)).train
    rows = read_rows(source, np.array([4, 2]))
    np.testing.assert_array_equal(rows["x"], FEATURES[[4, 2]])
    assert rows["label"].tolist() == [1, 2]
    with pytest.raises(InputError, match=r"data\.columns\.x = 2: no such column in .*, which has 2"):
        open_dataset(Data(source="python", columns={"x": 2}), (Items(as_tuple=True), None))


def test_datasets_bring_the_names_of_their_classes_and_their_transform() -> None:
    features = datasets.Features({"x": datasets.Value("float32"), "label": datasets.ClassLabel(names=["n", "y"])})
    whole = datasets.Dataset.from_dict({"x": [0.0, 1.0, 2.0], "label": [0, 1, 0]}, features=features)
    parts = datasets.DatasetDict(train=whole, test=whole.select([1]))
    dataset = open_dataset(PYTHON, parts)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.classes, dataset.label_names) == (3, 1, 2, ("n", "y"))
    doubled = whole.with_transform(lambda batch: {"x": [2 * x for x in batch["x"]]})
    assert read_rows(open_dataset(PYTHON, (doubled, None)).train, np.arange(3))["x"].tolist() == [0, 2, 4]


def test_a_dataset_of_ours_keeps_what_it_says() -> None:
    frame = pd.DataFrame({"x": [0.5, 1.5], "label": ["ham", "spam"]})
    ours = Dataset(train=frame, classes=2, label_names=("spam", "ham"), name="mail")
    dataset = open_dataset(PYTHON, ours)
    assert (dataset.test, dataset.classes, dataset.name) == (None, 2, "mail")
    assert read_rows(dataset.train, np.arange(2))["label"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (iter([1]), r"dataset \(train\)"),
        (
            {"x": [1, 2]},
            r"dataset \(train\) = 'dict': is no set of examples; give a datasets\.Dataset, a pandas DataFrame",
        ),
        ("mnist", "is no set of examples"),
        ((Items(), Items(), Items()), r"gave tuple; give \(train, test\)"),
        (pd.DataFrame({"x": [1.0, None], "label": [0, 1]}), r"column 1 of 2 of dataset \(train\) .*NaN"),
        (pd.DataFrame({"label": ["a", "b"]}), r"column 'label' .*the names of the classes are public"),
        (pd.DataFrame({1: [1]}), r"dataset \(train\) = '1 columns': name the columns of the data frame by text"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), "column 1 of 1 of .*datetime64.*: a model takes"),
        (([(1, 2)], [(1, 2)]), "an example that is no dict"),
        (({"x": np.zeros((3, 2))}, {"x": np.zeros((3, 1))}), r"test columns of dataset = .*float32\[1\].*float32\[2\]"),
        (({"x": np.zeros(3, np.uint8)}, {"x": np.zeros(3)}), r"test columns of dataset = .*float32.*uint8.* dtypes"),
    ],
)
def test_what_is_no_data_is_refused(what: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(PYTHON, what)


def test_a_dataset_beside_another_source_is_refused_and_none_at_all_too() -> None:
    for data, message in (
        (Data(source="idx", path="/x"), r"data\.path = '/x': a dataset was passed as well"),
        (Data(source="csv"), r"data\.source = 'csv': a dataset was passed"),
        (Data(options={"size": 3}), r"data\.options = .*a dataset was passed"),
    ):
        with pytest.raises(InputError, match=message):
            dpdist.train(Config(data=data, privacy=Privacy(enabled=False), training=Training(steps=1)), dataset=COLUMNS)
    with pytest.raises(InputError, match=r"data\.source = 'python': is for dpdist\.train\(config, dataset"):
        dpdist.open_dataset(PYTHON)


@pytest.mark.compute
def test_a_data_frame_trains_as_it_is(tmp_path: Path) -> None:
    """Ten lines of a user's: no source, no class, no function."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(400, 3)), columns=["a", "b", "c"])
    frame["y"] = (frame["a"] > 0).astype(int)
    config = dpdist.from_dict(
        {
            "data": {"columns": {"image": ["a", "b", "c"], "label": "y"}},
            "model": {"classes": 2, "options": {"hidden": [8], "scale": 1}},
            "privacy": {"target_epsilon": 8, "delta": 1e-4},
            "sampling": {"expected_batch_size": 100},
            "training": {"steps": 20},
            "run": {"dir": str(tmp_path / "run"), "plots": False, "progress": "off"},
        }
    )
    summary = dpdist.train(config, dataset=frame)
    assert summary["status"] == "finished"
    assert summary["dataset_size"] == 320
    assert summary["accuracy"] > 0.7
    assert "source: python" in (tmp_path / "run/config.yaml").read_text()
    assert dpdist.train(config, dataset=frame)["status"] == "finished"  # and is resumed as the run it is
