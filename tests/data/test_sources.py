"""Sources return the right rows in the requested order: arrays, user code on threads, and subsets."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpdist.data import ArraySource, Subset, read_rows, sources
from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError

IMAGES = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3, 1)
LABELS = np.arange(10, dtype=np.int32) % 4


def index_array(*indices: int) -> np.ndarray:
    return np.array(indices, np.int64)


class Items:
    """A user's source that returns examples one at a time and records the thread that read each."""

    def __init__(self, replaced: dict[int, Any] | None = None) -> None:
        self.replaced = replaced or {}
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        self.threads.add(threading.current_thread().name)
        return self.replaced.get(index, {"image": IMAGES[index], "label": LABELS[index]})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2, thread_name_prefix="reader") as pool:
        yield pool


@pytest.fixture
def arrays() -> ArraySource:
    return ArraySource({"image": IMAGES, "label": LABELS})


def test_an_array_source_gives_one_example_as_an_array_and_a_scalar(arrays: ArraySource) -> None:
    example = arrays[7]
    assert len(arrays) == 10
    assert set(example) == {"image", "label"}
    np.testing.assert_array_equal(example["image"], IMAGES[7])
    assert example["image"].dtype == np.uint8
    assert example["label"] == LABELS[7]
    assert np.shape(example["label"]) == ()
    with pytest.raises(IndexError):
        arrays[10]


def test_every_kind_of_source_gives_the_same_rows_in_the_order_asked(arrays: ArraySource) -> None:
    indices = index_array(3, 9, 0, 3)
    for source in (arrays, Items(), Subset(arrays, np.arange(10)), Subset(Items(), np.arange(10))):
        rows = read_rows(source, indices)
        np.testing.assert_array_equal(rows["image"], IMAGES[indices])
        np.testing.assert_array_equal(rows["label"], LABELS[indices])
        assert (rows["image"].dtype, rows["label"].dtype) == (np.uint8, np.int32)


def test_no_indices_give_columns_of_length_zero(arrays: ArraySource) -> None:
    for source in (arrays, Items(), Subset(arrays, index_array(1, 2)), Subset(Items(), index_array(1, 2))):
        rows = read_rows(source, index_array())
        assert {name: (rows[name].shape, rows[name].dtype) for name in rows} == {
            "image": ((0, 2, 3, 1), np.uint8),
            "label": ((0,), np.int32),
        }


def test_rows_are_the_callers_own(arrays: ArraySource) -> None:
    arrays.take(index_array(0, 1))["image"][:] = 0
    arrays[2]["image"][:] = 0
    np.testing.assert_array_equal(arrays.take(np.arange(10))["image"], np.arange(60).reshape(10, 2, 3, 1))


def test_a_memory_mapped_column_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = ArraySource({"image": mapped})
    assert np.shares_memory(source.arrays["image"], mapped)
    assert type(source.take(index_array(1, 2))["image"]) is np.ndarray


def test_rows_come_out_in_native_byte_order() -> None:
    foreign = np.arange(10, dtype=np.int32).astype(np.dtype(np.int32).newbyteorder("S"))

    class ForeignItems(Items):
        def __getitem__(self, index: int) -> Any:
            return {"label": foreign[index : index + 1]}

    for rows in (
        read_rows(ArraySource({"label": foreign}), index_array(2, 5)),
        read_rows(ForeignItems(), index_array(2, 5)),
    ):
        assert rows["label"].dtype.isnative
        assert rows["label"].ravel().tolist() == [2, 5]


def test_read_rows_prefers_take(arrays: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArraySource, "__getitem__", lambda self, index: pytest.fail("read one by one"))
    assert read_rows(arrays, index_array(4))["label"].tolist() == [LABELS[4]]


@pytest.mark.parametrize("view", [False, True])
def test_user_code_runs_on_the_pools_threads(pool: ThreadPoolExecutor, view: bool) -> None:
    items = Items()
    source = Subset(items, np.arange(10)) if view else items
    rows = read_rows(source, index_array(8, 1, 5), pool)
    np.testing.assert_array_equal(rows["label"], LABELS[[8, 1, 5]])
    assert items.threads
    assert all(name.startswith("reader") for name in items.threads)


def test_numbers_in_examples_become_columns() -> None:
    rows = read_rows([{"x": 1.5, "label": 3}, {"x": 2.5, "label": 4}], index_array(0, 1))
    assert rows["x"].tolist() == [1.5, 2.5]
    assert rows["label"].tolist() == [3, 4]


@pytest.mark.parametrize(
    "odd",
    [
        {"image": IMAGES[0]},
        {"image": IMAGES[0], "label": LABELS[0], "weight": 1.0},
        {"image": IMAGES[0, :1], "label": LABELS[0]},
        {"image": IMAGES[0].astype(np.float32), "label": LABELS[0]},
    ],
    ids=["column missing", "column more", "other shape", "other dtype"],
)
def test_examples_that_differ_are_refused_and_the_cause_alone_says_which(
    odd: dict[str, Any], pool: ThreadPoolExecutor
) -> None:
    with pytest.raises(InputError, match=r"data\.source = 'examples that differ': return the same") as caught:
        read_rows(Items({6: odd}), index_array(2, 6, 7), pool)
    assert re.match(r"example 6 is .*, and example 2 is", str(caught.value.__cause__))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ((IMAGES[0], LABELS[0]), "an example that is no dict"),
        ({"image": [[1], [2, 3]]}, "something else than numbers and bools"),
        ({"image": "cat.png"}, "something else than numbers and bools"),
        ({"image": None}, "something else than numbers and bools"),
    ],
    ids=["tuple", "ragged", "text", "None"],
)
def test_an_example_that_is_not_a_dict_of_arrays_is_refused(odd: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_rows(Items({6: odd}), index_array(6))
    assert isinstance(caught.value.__cause__, BadRecordError)
    assert "example 6" in str(caught.value.__cause__)
    assert "6" not in str(caught.value)


INTEGERS = [
    (np.int64, 2**31, np.int32),
    (np.int64, -(2**31) - 1, np.int32),
    (np.uint64, 2**32, np.uint32),
    (np.uint64, 2**64 - 1, np.uint32),
]
FLOATS = [(np.float64, 3.5e38, np.float32), (np.float64, -3.5e38, np.float32), (np.complex128, 1e39j, np.complex64)]


@pytest.mark.parametrize(("dtype", "value", "narrow"), INTEGERS + FLOATS)
def test_values_that_32_bits_cannot_hold_are_refused_when_arrays_are_opened_and_when_rows_are_read(
    dtype: Any, value: Any, narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = np.zeros(10, dtype)
    column[7] = value
    monkeypatch.setattr(sources, "_BLOCK", 4)  # several blocks
    with pytest.raises(
        InputError, match=rf"column 'x' of mine = '{dtype.__name__}': some values do not fit into"
    ) as at:
        ArraySource({"x": column}, name="mine")
    assert "example 7" in str(at.value.__cause__)
    assert "7" not in str(at.value)
    changed = ArraySource({"x": np.zeros(10, dtype)})
    changed.arrays["x"][7] = value  # a file may change once it is mapped
    for source in (changed, [{"x": one} for one in column], Subset(changed, np.arange(10))):
        with pytest.raises(InputError, match=f"column 'x' = '{dtype.__name__}': .*{narrow.__name__}") as caught:
            read_rows(source, index_array(3, 7))
        assert "example 7" in str(caught.value.__cause__)
        assert read_rows(source, index_array(3))["x"].dtype == narrow


def test_values_that_fit_are_read_in_32_bits_and_unchanged_or_rounded() -> None:
    edges = {
        "i": np.array([-(2**31), 2**31 - 1]),
        "u": np.array([0, 2**32 - 1], np.uint64),
        "f": np.array([-3.4028234e38, 1 / 3]),
        "not finite": np.array([np.inf, np.nan]),
        "narrow": np.array([2**32 - 1, 7], np.uint32),
        "half": np.array([1, 2], np.float16),
    }
    rows = read_rows(ArraySource(edges), index_array(0, 1))
    assert {name: values.dtype.name for name, values in rows.items()} == {
        "i": "int32",
        "u": "uint32",
        "f": "float32",
        "not finite": "float32",
        "narrow": "uint32",
        "half": "float16",
    }
    for name in ("i", "u", "not finite", "narrow", "half"):
        np.testing.assert_array_equal(rows[name], edges[name])
    np.testing.assert_array_equal(rows["f"], edges["f"].astype(np.float32))


def test_columns_without_values_have_nothing_that_does_not_fit() -> None:
    empty = ArraySource({"x": np.zeros((3, 0)), "y": np.zeros((3, 0, 2), np.int64)})
    assert read_rows(empty, index_array(0, 2))["y"].shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "at least one column"),
        ({"label": np.array(3)}, "one row an example"),
        ({"image": IMAGES, "label": LABELS[:9]}, r"mine = .*uint8\[10,2,3,1\].*int32\[9\].* differ in length"),
        ({"label": np.array(["a", "b"])}, "column 'label' = 'dtype <U1'"),
        ({"label": np.array([{}, {}])}, "column 'label' = 'dtype object'"),
    ],
    ids=["none", "scalar", "lengths", "text", "objects"],
)
def test_columns_that_cannot_be_examples_are_refused(columns: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ArraySource(columns, name="mine")


def test_a_subset_renumbers_from_zero_and_nests(arrays: ArraySource) -> None:
    outer = Subset(arrays, index_array(1, 3, 5, 7))
    inner = Subset(outer, index_array(1, 3))
    assert (len(outer), len(inner)) == (4, 2)
    assert [int(inner[i]["label"]) for i in range(2)] == [LABELS[3], LABELS[7]]
    np.testing.assert_array_equal(inner.take(index_array(1, 0))["image"], IMAGES[[7, 3]])
    assert inner.source is arrays


@pytest.mark.parametrize(
    "indices", [(1, 1), (2, 1), (-1, 0), (9, 10)], ids=["repeated", "out of order", "negative", "outside"]
)
def test_a_subset_holds_each_record_at_most_once(arrays: ArraySource, indices: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="strictly increasing indices from 0 to 9"):
        Subset(arrays, index_array(*indices))
