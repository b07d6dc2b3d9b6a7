"""Opening `data.source`: digits, the user's own function, and the split by index."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpdist.config import Data
from dpdist.data import ArraySource, Dataset, open_dataset, read_rows
from dpdist.data.parts import split_indices
from dpdist.errors import InputError

MODULE = """
import numpy as np
from dpdist.data import ArraySource, Dataset

def columns(n):
    return {"image": np.zeros((n, 2)), "label": np.arange(n)}

def pair(train, test=2):
    return ArraySource(columns(train)), ArraySource(columns(test))

def whole(train, classes):
    return Dataset(train=ArraySource(columns(train)), classes=classes, name="mine")

def at(path):
    return Dataset(train=ArraySource(columns(3)), name=f"at {path}")

def returns(what):
    return {"one": ArraySource(columns(3)), "none": None, "dicts": (columns(3), columns(3)),
            "three": (1, 2, 3), "dict of lists": ({"label": [1]}, None), "arrays": {"label": np.arange(10)},
            "differing": ({"label": np.arange(3)}, {"label": np.arange(3.0)}),
            "no test": (ArraySource(columns(3)), None),
            "empty": (ArraySource(columns(0)), None), "lists": ([{"label": 1}], [{"label": 2}])}[what]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write `MODULE` to an importable file and return the module's name."""
    name = "user_data_" + re.sub(r"\W", "_", tmp_path.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_digits_splits_1797_images_into_1437_and_360() -> None:
    dataset = open_dataset(Data(source="digits"))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.classes, dataset.name) == (1437, 360, 10, "digits")
    rows = read_rows(dataset.train, np.arange(1437))
    assert (rows["image"].shape, rows["image"].dtype) == ((1437, 8, 8, 1), np.uint8)
    assert (rows["image"].min(), rows["image"].max()) == (0, 16)
    assert rows["label"].dtype == np.int32
    assert set(rows["label"].tolist()) == set(range(10))


def test_digits_are_those_of_scikit_learn_read_without_importing_it() -> None:
    code = "import sys; from dpdist.data import open_dataset; from dpdist.config import Data; open_dataset(Data())"
    subprocess.run([sys.executable, "-c", code + "; sys.exit('sklearn' in sys.modules)"], check=True)
    from sklearn.datasets import load_digits

    dataset, digits = open_dataset(Data()), load_digits()
    kept, held_out = split_indices(1797, Data())
    for source, rows in ((dataset.train, kept), (dataset.test, held_out)):
        assert source is not None
        found = read_rows(source, np.arange(len(rows)))
        np.testing.assert_array_equal(found["image"][..., 0], digits.images[rows])
        np.testing.assert_array_equal(found["label"], digits.target[rows])


def test_the_split_is_disjoint_sorted_and_covers_every_index() -> None:
    train, test = split_indices(1797, Data())
    assert (len(train), len(test)) == (1437, 360)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    for part in (train, test):
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)


def test_the_split_is_the_same_on_every_machine_and_numpy() -> None:
    """The indices are pinned: a run resumed under another NumPy must see the same train set."""
    assert split_indices(20, Data(split_seed=0))[1].tolist() == [0, 8, 9, 19]
    assert split_indices(20, Data(split_seed=1))[1].tolist() != [0, 8, 9, 19]


def test_the_held_out_part_is_drawn_from_everywhere() -> None:
    _, test = split_indices(10_000, Data(test_fraction=0.3))
    assert len(test) == 3000
    assert np.all(np.abs(np.histogram(test, bins=10, range=(0, 10_000))[0] - 300) < 5 * np.sqrt(300 * 0.7))


def test_a_negative_split_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.split_seed = -1"):
        open_dataset(Data(split_seed=-1))


def test_a_split_that_leaves_no_train_example_is_refused() -> None:
    with pytest.raises(InputError, match=r"digits \(train\) = '0 examples'"):
        open_dataset(Data(test_fraction=0.9999))


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"data\.source = 'mnist'.*digits, idx, npy.*module:function"):
        open_dataset(Data(source="mnist"))


def test_options_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.options\.classes = 10: digits takes none; only a module:function"):
        open_dataset(Data(source="digits", options={"classes": 10}))


def test_a_function_is_called_with_the_options_and_may_return_a_pair(module: str) -> None:
    dataset = open_dataset(Data(source=f"{module}:pair", options={"train": 7, "test": 3}))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (7, 3, None)


def test_a_function_may_return_a_dataset(module: str) -> None:
    dataset = open_dataset(Data(source=f"{module}:whole", options={"train": 7, "classes": 5}))
    assert (len(dataset.train), dataset.test, dataset.classes, dataset.name) == (7, None, 5, "mine")


@pytest.mark.parametrize(("what", "test"), [("no test", None), ("lists", [{"label": 2}])])
def test_what_a_function_returns_is_used_unchanged(module: str, what: str, test: Any) -> None:
    assert open_dataset(Data(source=f"{module}:returns", options={"what": what})).test == test


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", r"gave NoneType; give \(train, test\), or one set: a datasets.Dataset, a pandas"),
        ("three", r"gave tuple; give \(train, test\)"),
        ("dict of lists", r"\(train\) = 'dict': is no set of examples; give .* a dict of arrays"),
        ("differing", r"test columns of .* = {'label': 'float32\[\]'}: the train columns are {'label': 'int32\[\]'}"),
        ("empty", r"\(train\) = '0 examples'"),
    ],
)
def test_a_function_that_returns_something_else_is_reported(module: str, what: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(Data(source=f"{module}:returns", options={"what": what}))


@pytest.mark.parametrize("what", ["one", "arrays"])
def test_one_set_of_examples_is_split_by_index(module: str, what: str) -> None:
    dataset = open_dataset(Data(source=f"{module}:returns", options={"what": what}))
    assert dataset.test is not None
    rows = [read_rows(part, np.arange(len(part)))["label"].tolist() for part in (dataset.train, dataset.test)]
    whole = sum(map(len, rows))
    kept, held_out = split_indices(whole, Data())
    assert rows == [kept.tolist(), held_out.tolist()]


def test_the_path_is_passed_to_a_function_that_takes_one_and_refused_by_any_other(module: str) -> None:
    with pytest.raises(InputError, match=r"data\.path = '/there': is passed to .*:pair\(train, .*no parameter `path`"):
        open_dataset(Data(source=f"{module}:pair", path="/there", options={"train": 3}))
    with pytest.raises(InputError, match=r"data\.path = '/there': .*give it once"):
        open_dataset(Data(source=f"{module}:at", path="/there", options={"path": "/elsewhere"}))
    with pytest.raises(InputError, match=r"data\.path = '/there': digits reads no path"):
        open_dataset(Data(source="digits", path="/there"))
    assert open_dataset(Data(source=f"{module}:at", path="/there")).name == "at /there"


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("pair", {}, r"data\.options = {}: missing a required argument: 'train'; .*\(train, test=2\)"),
        ("pair", {"train": 1, "tset": 2}, "unexpected keyword argument 'tset'"),
        ("absent", {}, r"data\.source = .*absent"),
    ],
)
def test_a_call_that_cannot_work_names_what_is_wrong(
    module: str, function: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(Data(source=f"{module}:{function}", options=options))


def test_a_module_that_cannot_be_imported_is_named_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"data\.source = 'no_such_module:load'.*No module named"):
        open_dataset(Data(source="no_such_module:load"))


def test_an_empty_test_set_is_refused() -> None:
    source = ArraySource({"label": np.arange(3)})
    empty = ArraySource({"label": np.arange(0)})
    with pytest.raises(InputError, match=r"mine \(test\) = '0 examples'"):
        Dataset(train=source, test=empty, name="mine")
