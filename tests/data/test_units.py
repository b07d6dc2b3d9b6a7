"""Everybody's records as one example: which rows they are, how they are split, and what cannot be a unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpdist.config import Data
from dpdist.data import ArraySource, Subset, fingerprint, open_dataset, read_rows
from dpdist.data.table import Texts, numbered
from dpdist.data.units import MASK, UnitSource, WithoutColumn, require_apart
from dpdist.errors import InputError
from dpdist.release.examples import open_examples

#: Who has which record, out of order; 7 has five, 2 has one.
OWNER = np.array([7, 3, 7, 2, 7, 3, 7, 7, 3, 11])
COLUMNS = {"x": np.arange(10, dtype=np.float32), "label": np.arange(10) % 3, "who": OWNER}


def units(records: int = 3, columns: dict[str, np.ndarray] = COLUMNS) -> UnitSource:
    return UnitSource(ArraySource(columns), "who", records)


class Items:
    """Random access alone."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in COLUMNS.items()}


@pytest.mark.parametrize("source", [ArraySource(COLUMNS), Items()])
def test_an_example_is_a_unit_with_its_first_records_in_order(source: Any) -> None:
    found = UnitSource(source, "who", 3)
    assert len(found) == 4
    rows = read_rows(found, np.arange(4))  # 2, 3, 7, 11
    assert set(rows) == {"x", "label", MASK}
    assert rows[MASK].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert rows["x"].tolist() == [[3, 3, 3], [1, 5, 8], [0, 2, 4], [9, 9, 9]]  # padded by its own first record
    assert found.left_out == 2
    assert found[2]["x"].tolist() == [0, 2, 4]
    assert read_rows(found, np.array([], np.int64))["x"].shape == (0, 3)
    assert read_rows(Subset(found, np.array([1, 3])), np.array([1]))["x"].tolist() == [[9, 9, 9]]


def test_no_row_of_a_unit_is_anothers() -> None:
    draw = np.random.default_rng(0)
    owner = draw.integers(0, 40, 500)
    source = UnitSource(ArraySource({"mine": owner.astype(np.float32), "who": owner}), "who", 6)
    rows = read_rows(source, np.arange(len(source)))["mine"]
    assert np.array_equal(rows, np.repeat(np.unique(owner)[:, None], 6, axis=1))


def test_the_fingerprint_tells_whose_a_record_is_and_how_many_count() -> None:
    moved = COLUMNS | {"who": np.where(np.arange(10) == 4, 3, OWNER)}
    assert len({fingerprint(source) for source in (units(), units(4), units(columns=moved))}) == 3
    assert fingerprint(units()) == fingerprint(units())
    plain = ArraySource(COLUMNS)
    assert fingerprint(WithoutColumn(plain, "who")) not in (fingerprint(plain), fingerprint(units()))


def test_a_record_whose_owner_is_not_named_is_refused(tmp_path: Path) -> None:
    for empty in ("", "  "):
        (tmp_path / "x.csv").write_text(f"x,label,who\n1,0,ann\n2,1,{empty}\n3,0,bob\n")
        data = Data(source="csv", path=str(tmp_path / "x.csv"), unit="who", records_per_unit=1)
        with pytest.raises(InputError, match=r"data\.unit = 'who': .*not names, some of them missing"):
            open_dataset(data)


def test_what_cannot_be_a_unit_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.unit = 'user': there is no such column; there are 3"):
        UnitSource(ArraySource(COLUMNS), "user", 3)
    with pytest.raises(InputError, match=r"data\.unit = 'x': it must hold one integer a record, not float32"):
        UnitSource(ArraySource(COLUMNS), "x", 3)
    with pytest.raises(InputError, match=r"'unit_mask'.*rename it"):
        UnitSource(ArraySource(COLUMNS | {MASK: OWNER}), "who", 3)
    with pytest.raises(InputError, match=r"data\.records_per_unit.*together"):
        Data(unit="who")
    with pytest.raises(InputError, match=r"data\.records_per_unit.*together"):
        Data(records_per_unit=3)


def test_units_with_training_and_test_records_are_refused_without_naming_them() -> None:
    with pytest.raises(InputError, match="guarantee covers no test record") as caught:
        require_apart(units(), ArraySource({"who": np.array([5, 11])}))
    assert "11" not in str(caught.value)
    assert "such as 11" in str(caught.value.__cause__)
    require_apart(units(), ArraySource({"who": np.array([5, 6])}))
    require_apart(units(), ArraySource({"who": np.array([5, 6], np.uint8)}))


def test_a_test_part_that_does_not_say_whose_its_records_are_is_refused() -> None:
    """Nor can names, which are held as two numbers, be compared with numbers."""
    without = {name: column for name, column in COLUMNS.items() if name != "who"}
    for other in (without, without | {"who": numbered(Texts(["7"] * 10), "who", "here")}):
        with pytest.raises(InputError, match="nobody can see"):
            require_apart(units(), ArraySource(other))
        with pytest.raises(InputError, match="nobody can see"):
            open_dataset(Data(source="python", unit="who", records_per_unit=2), (COLUMNS, other))
    named = units(columns=COLUMNS | {"who": numbered(Texts(["a", "b"] * 5), "who", "here")})
    with pytest.raises(InputError, match="nobody can see"):
        require_apart(named, ArraySource(COLUMNS))


def test_a_built_in_source_is_split_by_unit(tmp_path: Any) -> None:
    owner = np.random.default_rng(1).integers(0, 30, 400)
    arrays = {"image": np.arange(400, dtype=np.float32)[:, None], "label": owner % 2, "who": owner}
    for name, values in arrays.items():
        np.save(tmp_path / f"train_{name}.npy", values)
    found = open_dataset(Data(source="npy", path=str(tmp_path), unit="who", records_per_unit=50, test_fraction=0.2))
    train, test = found.train, found.test
    assert isinstance(train, UnitSource)
    assert test is not None
    assert (len(train), len(np.unique(owner))) == (24, 30)
    tested = read_rows(test, np.arange(len(test)))
    assert set(tested) == {"image", "label"}
    assert not set(owner[tested["image"][:, 0].astype(int)]) & set(train.owner)
    assert len(test) + len(train.owner) == 400


def test_names_of_units_are_numbered_the_same_in_every_part(tmp_path: Any) -> None:
    who = ["eva", "tom", "eva", "kim", "tom", "eva"]
    text = "\n".join(["a,b,label,who", *(f"{i},{i * 2},{i % 2},{name}" for i, name in enumerate(who))])
    for part, last in (("train", "6,12,0,tom"), ("test", "7,14,1,ann")):
        (tmp_path / f"{part}.csv").write_text(
            text + "\n" + last if part == "train" else text.split("\n")[0] + "\n" + last
        )
    chosen = {"features": ["a", "b"], "label": "label", "who": "who"}
    data = Data(source="csv", path=str(tmp_path), columns=chosen, unit="who", records_per_unit=2)
    found = open_dataset(data)
    rows = read_rows(found.train, np.arange(len(found.train)))
    pairs = sorted(tuple(row[mask][:, 0].tolist()) for row, mask in zip(rows["features"], rows[MASK], strict=True))
    assert pairs == [(0, 2), (1, 4), (3,)]
    assert found.test is not None
    assert set(read_rows(found.test, np.array([0]))) == {"features", "label"}
    (tmp_path / "test.csv").write_text("a,b,label,who\n7,14,1,eva\n")
    with pytest.raises(InputError, match="covers no test record"):
        open_dataset(data)
    # One file has numbers alone, the other a name beside them.
    (tmp_path / "train.csv").write_text("a,b,label,who\n1,2,0,100\n3,4,1,101\n")
    (tmp_path / "test.csv").write_text("a,b,label,who\n7,14,1,101\n7,14,1,X9\n")
    with pytest.raises(InputError, match="covers no test record"):
        open_dataset(data)
    # What looks like a number may be a name: these are two people.
    (tmp_path / "train.csv").write_text("a,b,label,who\n1,2,0,001\n3,4,1,1\n")
    (tmp_path / "test.csv").write_text("a,b,label,who\n7,14,1,01\n")
    assert len(open_dataset(data).train) == 2
    with pytest.raises(InputError, match=r"data\.unit = 'who': .* a name or an integer for each record, not float"):
        numbered(np.array([0.5, 101]), "who", "here")


def test_numbers_of_64_bits_and_many_names_stay_apart() -> None:
    many = numbered(Texts([f"patient {n}" for n in range(200_000)]), "who", "here")
    found = UnitSource(ArraySource({"x": np.zeros(200_000, np.float32), "who": many}), "who", 1)
    assert len(found) == 200_000
    large = numbered(np.array([10**15, 10**15 + 2**32, 10**15]), "who", "here")
    assert len(UnitSource(ArraySource({"x": np.zeros(3, np.float32), "who": large}), "who", 2)) == 2


def test_a_renamed_column_is_split_by_unit_too(tmp_path: Any) -> None:
    owner = np.random.default_rng(1).integers(0, 30, 400)
    for name, values in {"image": np.zeros((400, 2), np.float32), "label": owner % 2, "who": owner}.items():
        np.save(tmp_path / f"train_{name}.npy", values)
    columns = {"image": "image", "label": "label", "user": "who"}
    found = open_dataset(Data(source="npy", path=str(tmp_path), columns=columns, unit="user", records_per_unit=9))
    assert len(found.train) == 24


@pytest.mark.parametrize(("part", "count"), [("train", 3), ("test", 2), ("all", 5)])
def test_a_prediction_is_made_for_each_record_whoever_has_it(tmp_path: Any, part: Any, count: int) -> None:
    (tmp_path / "train.csv").write_text("a,b,target,who\n1,2,0,ann\n3,4,1,ann\n5,6,1,tom\n")
    (tmp_path / "test.csv").write_text("a,b,target,who\n7,8,1,eva\n9,10,0,eva\n")
    tree = {"data": {"source": "csv", "path": str(tmp_path), "unit": "who", "records_per_unit": 2}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    found = open_examples(str(tmp_path / "spec.yaml"), known=Data(), columns=("features",), part=part)
    rows = read_rows(found, np.arange(len(found)))["features"]
    assert rows.shape == (count, 2)
    assert rows[:, 0].tolist() == {"train": [1, 3, 5], "test": [7, 9], "all": [1, 3, 5, 7, 9]}[part]
