"""Label checks, and a fingerprint that changes with the data and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpdist.data import ArraySource, Source, Subset, checks, fingerprint
from dpdist.data.checks import require_below, require_values
from dpdist.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (700, 2, 2), dtype=np.uint8)
LABELS = (np.arange(700) % 5).astype(np.int32)


class Items:
    """A user's source that counts the examples read."""

    def __init__(self, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> None:
        self.images, self.labels, self.read = images, labels, set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.add(index)
        return {"image": self.images[index], "label": self.labels[index]}


def changed(array: np.ndarray, index: int) -> np.ndarray:
    array = array.copy()
    array[index] += 1
    return array


def of(images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> ArraySource:
    return ArraySource({"image": images, "label": labels})


def check(source: Source, classes: int) -> None:
    require_below(source, "label", classes, field="model.classes", value=classes, remedy="set it.")


def test_labels_in_range_pass() -> None:
    for source in (of(), Subset(of(), np.arange(5)), Items()):
        check(source, 5)


@pytest.mark.parametrize("labels", [changed(LABELS, 699), LABELS - 1, LABELS + 1])
def test_labels_out_of_range_are_refused_without_showing_them(labels: np.ndarray) -> None:
    with pytest.raises(
        InputError, match=r"model\.classes = 5: some values of 'label' lie outside 0 to 4; set"
    ) as caught:
        check(of(labels=labels), 5)
    first = np.flatnonzero((labels < 0) | (labels > 4))[0]
    assert f"{labels[first]}, of example {first}" in str(caught.value.__cause__)


def test_every_block_of_a_long_column_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "BLOCK_CHECKED", 64)
    for index in (0, 63, 64, 699):
        with pytest.raises(InputError, match="outside 0 to 4") as caught:
            check(of(labels=np.where(np.arange(700) == index, 7, LABELS)), 5)
        assert f"7, of example {index}" in str(caught.value.__cause__)
    check(of(), 5)


def test_only_the_labels_of_the_subset_count() -> None:
    source = of(labels=changed(LABELS, 699))
    check(Subset(source, np.arange(699)), 5)
    with pytest.raises(InputError, match="outside 0 to 4"):
        check(Subset(source, np.array([4, 699])), 5)


def test_a_column_of_width_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.source = \"column 'extra': float64\[2,0\] an example\": holds no"):
        require_values({"image": IMAGES[0], "extra": np.zeros((2, 0))})
    require_values({"image": IMAGES[0], "label": LABELS[0]})


def test_user_code_is_asked_for_the_first_sixteen_labels_only() -> None:
    items = Items()
    check(items, 5)
    assert items.read == set(range(16))
    with pytest.raises(InputError, match="outside 0 to 4"):
        check(Items(labels=changed(LABELS, 14)), 5)
    with pytest.raises(InputError, match="outside 0 to 4"):
        check(Subset(Items(labels=changed(LABELS, 699)), np.arange(690, 700)), 5)


@pytest.mark.parametrize(
    "other",
    [
        of(labels=changed(LABELS, 0)),
        of(images=changed(IMAGES, 699)),
        of(images=changed(IMAGES, 255)),
        of(IMAGES[:699], LABELS[:699]),
        of(images=IMAGES.reshape(700, 4)),
        of(labels=LABELS.astype(np.int16)),
        ArraySource({"picture": IMAGES, "label": LABELS}),
        ArraySource({"image": IMAGES}),
        of(images=np.roll(IMAGES, 1, axis=0)),
        Subset(of(), np.arange(1, 700)),
    ],
    ids=["first label", "last image", "middle image", "length", "shape", "dtype", "name", "columns", "order", "subset"],
)
def test_the_fingerprint_changes_with_the_data(other: ArraySource) -> None:
    assert fingerprint(other) != fingerprint(of())


def test_the_fingerprint_does_not_depend_on_how_the_data_is_stored(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", IMAGES)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    expected = fingerprint(of())
    assert len(expected) == 32
    assert fingerprint(of(mapped, LABELS.astype(">i4"))) == expected
    assert fingerprint(of(np.asfortranarray(IMAGES))) == expected
    assert fingerprint(ArraySource({"label": LABELS, "image": IMAGES})) == expected
    assert fingerprint(Subset(of(), np.arange(700))) == expected


def test_a_subset_is_fingerprinted_as_the_examples_it_shows() -> None:
    assert fingerprint(Subset(of(), np.arange(100, 500))) == fingerprint(of(IMAGES[100:500], LABELS[100:500]))


def test_a_large_array_source_is_sampled_from_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(index: int) -> bool:
        return fingerprint(of(images=changed(IMAGES, index))) != fingerprint(of())

    assert all(differs(index) for index in range(690, 700))
    monkeypatch.setattr(checks, "HASHED_WHOLE", 700 * 8 - 1)
    monkeypatch.setattr(checks, "HASHED_ROWS", 70)
    seen = [index for index in range(700) if differs(index)]
    assert (len(seen), seen[0], seen[-1]) == (70, 0, 699)
    assert set(np.diff(seen)) == {10, 11}


def test_user_code_is_asked_for_64_evenly_spaced_examples() -> None:
    items = Items()
    first = fingerprint(items)
    read = sorted(items.read)
    assert (len(read), read[0], read[-1]) == (64, 0, 699)
    assert set(np.diff(read)) == {11, 12}
    assert fingerprint(Items()) == first
    assert fingerprint(Items(images=changed(IMAGES, 699))) != first


def test_sources_of_different_lengths_differ_though_the_sampled_examples_agree() -> None:
    same = np.zeros(700, np.int32)
    assert fingerprint(Items(images=same[:600], labels=same)) != fingerprint(Items(images=same, labels=same))


def test_one_example_can_be_fingerprinted() -> None:
    assert fingerprint(of(IMAGES[:1], LABELS[:1])) != fingerprint(of(IMAGES[1:2], LABELS[1:2]))


class Augmented(Items):
    """Flips half of its images, by a generator that goes on from where it was."""

    draw = np.random.default_rng(1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        return example | ({"image": example["image"][::-1]} if self.draw.random() < 0.5 else {})


def test_a_source_that_answers_differently_is_refused_with_where_to_randomise_instead() -> None:
    with pytest.raises(InputError, match=r"data\.source = 'an example': is another one .*randomised=True.*`key`"):
        fingerprint(Augmented())


def test_no_source_has_a_fingerprint_of_its_own() -> None:
    assert fingerprint(None) not in (fingerprint(of()), fingerprint(of(IMAGES[:1], LABELS[:1])))
    assert fingerprint(None) == fingerprint(None)
