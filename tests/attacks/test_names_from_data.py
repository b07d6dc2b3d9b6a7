"""A name that the data gives may be a person's, or a record: what everyone may read has those of the config alone."""

from __future__ import annotations

import gzip
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpdist.config import Data, from_dict
from dpdist.data import open_dataset
from dpdist.errors import InputError
from dpdist_launch.data import describe

#: The first record of a file without a line of names.
RECORD = "I have HIV since 2019 says Alice Smith,positive\n"


def files(root: Path, **contents: str) -> str:
    """Files by name, `__` for a dot and `_in_` for a slash."""
    for name, content in contents.items():
        path = root / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(root)


def parquet(root: Path, **columns: dict[str, Any]) -> str:
    for name, values in columns.items():
        pq.write_table(pa.table(values), root / f"{name}.parquet")
    return str(root)


def tokenizer(root: Path) -> str:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).save(str(root / "tokenizer.json"))
    return str(root / "tokenizer.json")


def text(root: Path, path: str, **columns: str) -> dict[str, Any]:
    options = {"tokenizer": tokenizer(root), "length": 4}
    return {"source": "text", "path": path, "options": options} | ({"columns": columns} if columns else {})


NAMES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "text without a line of names": lambda root: text(root, files(root, x__csv=RECORD * 2), text="review"),
    "text of the usual name": lambda root: text(root, files(root, x__csv=RECORD * 2)),
    "JSON with other keys": lambda root: text(root, files(root, x__jsonl=json.dumps({"Alice": "a"}))),
    "a label without a line of names": lambda root: {
        "source": "csv",
        "path": files(root, x__csv=RECORD * 2),
        "columns": {"label": "diagnosis"},
    },
    "features without a line of names": lambda root: {"source": "csv", "path": files(root, x__csv=RECORD * 2)},
    "a train file whose names the test file lacks": lambda root: {
        "source": "csv",
        "path": files(root, train__csv="Alice,label\n1,0\n2,1\n", test__csv="Bob,label\n1,0\n"),
    },
    "a file a person, of other columns": lambda root: {
        "source": "csv",
        "path": files(root, Alice__csv="a,label\n1,0\n", Bob__csv="b,label\n1,0\n"),
    },
    "a damaged file of a person": lambda root: {
        "source": "csv",
        "path": files(root, Alice__csv='a,label\n"1,0\n', Bob__csv="a,label\n1,0\n"),
    },
    "a file a person, of other types": lambda root: {
        "source": "parquet",
        "path": parquet(root, Alice={"a": [1]}, Bob={"a": [1.5]}),
    },
    "a damaged Parquet file of a person": lambda root: {
        "source": "parquet",
        "path": files(root, Alice__parquet="PAR1 Alice", Bob__parquet="PAR1"),
    },
    "a column of a Parquet file": lambda root: {
        "source": "parquet",
        "path": parquet(root, x={"Alice": ["a", "b"], "label": [0, 1]}),
    },
    "a file of a person, of no part": lambda root: {
        "source": "csv",
        "path": files(root, train__csv="a,label\n1,0\n", Alice__csv="a,label\n1,0\n"),
    },
    "a file of a person, twice": lambda root: {
        "source": "csv",
        "path": files(root, Alice__csv="a,label\n1,0\n", Alice__csv__gz="a,label\n1,0\n"),
    },
    "documents of a person, of other keys": lambda root: text(
        root, files(root / "d", Alice__jsonl='{"text": "a"}\n{"x": 1}\n', Bob__jsonl='{"text": "a"}\n')
    ),
    "arrays that are no train columns": lambda root: {
        "source": "npy",
        "path": (np.save(root / "Alice.npy", np.zeros(3)), str(root))[1],
    },
    "a unit that is no column": lambda root: {
        "source": "parquet",
        "path": parquet(root, x={"Alice": [1, 2], "label": [0, 1]}),
        "unit": "who",
        "records_per_unit": 1,
    },
    "a folder beside the parts": lambda root: {
        "source": "image_folder",
        "path": files(root, train_in_a_in_1__png="", train_in_b_in_1__png="", Alice_in_1__png=""),
    },
    "a class of the test part alone": lambda root: {
        "source": "image_folder",
        "path": files(root, train_in_a_in_1__png="", train_in_b_in_1__png="", test_in_Alice_in_1__png=""),
    },
    "another folder as the part": lambda root: {
        "source": "image_folder",
        "path": files(root, Alice_in_a_in_1__png="", Alice_in_b_in_1__png=""),
        "options": {"train": "fold1"},
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_only_names_of_the_config_are_shown(tmp_path: Path, name: str) -> None:
    given = NAMES[name](tmp_path)
    with pytest.raises(InputError) as caught:
        open_dataset(Data(**given))
    error = caught.value
    assert "Alice" not in str(error)
    assert "Alice" not in repr(error.value)
    assert "Alice" in "".join(traceback.format_exception(error))  # as the private log has it
    config = from_dict({"data": given, "privacy": {"enabled": False}, "training": {"steps": 1}})
    if "describe" in str(error):
        with pytest.raises(InputError, match="Alice"):
            describe(config, rows=1)


def test_a_value_that_no_device_holds_is_in_a_column_without_its_name(tmp_path: Path) -> None:
    path = files(tmp_path, x__csv="Alice,label\n1,0\n5000000123,1\n")
    with pytest.raises(
        InputError, match=r"column 1 of data\.columns\.features = 'int64': some values do not fit"
    ) as caught:
        open_dataset(Data(source="csv", path=path))
    assert "Alice" not in str(caught.value)


def test_a_frame_whose_columns_have_no_names_shows_none() -> None:
    from dpdist.data.datasets import GIVEN

    with pytest.raises(InputError) as caught:
        open_dataset(Data(source=GIVEN), pd.DataFrame({"Alice": [1], 2: [0]}))
    assert "Alice" not in str(caught.value)


def test_names_that_the_config_gives_are_shown(tmp_path: Path) -> None:
    path = files(tmp_path, x__csv="a,b\n1,x\n2,y\n")
    with pytest.raises(InputError, match=r"data\.columns\.label = 'diagnosis': no such column in .*, which has 2"):
        open_dataset(Data(source="csv", path=path, columns={"label": "diagnosis"}))
    with pytest.raises(InputError, match=r"column 'b' of .* = 'text'"):
        open_dataset(Data(source="csv", path=path, columns={"features": ["a", "b"]}))
    with pytest.raises(InputError, match=r"data\.path = '.*x\.csv': its first line has to name"):
        open_dataset(Data(source="csv", path=files(tmp_path, x__csv="1,2\n") + "/x.csv"))
