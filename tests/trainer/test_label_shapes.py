"""Labels that are no class, and columns of nothing, are told by column and shape before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import userland
from jobs import Jobs, config_with

TRAIN, TEST = userland.train_columns(), userland.test_columns()


def one_hot(columns: userland.Columns, kind: type = np.int32) -> userland.Columns:
    return columns | {"label": np.eye(4, dtype=kind)[columns["label"]]}


def one_column(columns: userland.Columns) -> userland.Columns:
    return columns | {"label": columns["label"][:, None]}


def with_nothing(columns: userland.Columns) -> userland.Columns:
    return columns | {"extra": np.zeros((len(columns["label"]), 0), np.float32)}


#: Train and test columns, what the error calls the value, and a part of its remedy.
CASES: dict[str, tuple[userland.Columns, userland.Columns, str, str]] = {
    "one column": (one_column(TRAIN), one_column(TEST), "column 'label': int32[1]", "each train example needs one"),
    "one-hot": (one_hot(TRAIN), one_hot(TEST), "column 'label': int32[4]", "argmax"),
    "one-hot floats": (one_hot(TRAIN, np.float32), one_hot(TEST, np.float32), "label': float32[4]", "argmax"),
    "test only": (TRAIN, one_column(TEST), "'label': 'int32[1]'", "both need the same names, shapes and dtypes"),
    "no label": ({"image": TRAIN["image"]}, {"image": TEST["image"]}, "columns image", "named 'label'"),
    "zero width": (with_nothing(TRAIN), with_nothing(TEST), "column 'extra': float32[0]", "leave the column out"),
}

SOURCE = """
import numpy as np
from dpdist.data import ArraySource

def read(file):
    columns = dict(np.load(file))
    return tuple(
        ArraySource({name[len(part):]: array for name, array in columns.items() if name.startswith(part)})
        for part in ("train_", "test_")
    )

def squared(logits, example):
    return ((logits - example["label"]) ** 2).sum()
"""


def changes(jobs: Jobs, tmp_path: Path, train: userland.Columns, test: userland.Columns) -> dict[str, Any]:
    """The `data` section of a source with these columns."""
    (jobs.root / "label_shapes.py").write_text(SOURCE)
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    parts = (("train_", train), ("test_", test))
    np.savez(file, **{prefix + name: array for prefix, part in parts for name, array in part.items()})  # type: ignore[arg-type]
    return {"source": "label_shapes:read", "options": {"file": str(file)}}


def test_the_column_its_shape_and_what_to_do_are_told(jobs: Jobs, tmp_path: Path) -> None:
    """A loss of the user's own may have labels of any shape, where nothing else is measured."""
    runs = {name: jobs.new("labels") for name in CASES}
    configs = [config_with(runs[name].root, data=changes(jobs, tmp_path, *CASES[name][:2])) for name in CASES]
    own_loss = {
        "data": changes(jobs, tmp_path, one_hot(TRAIN), one_hot(TEST)),
        "model": {"loss": "label_shapes:squared", "task": "none"},
    }
    configs.append(config_with(jobs.new("targets").root, training={"steps": 2}, **own_loss))
    *answers, summary = jobs.call("train_all", configs=configs)
    for (name, (_, _, value, remedy)), answer in zip(CASES.items(), answers, strict=True):
        field = "test columns of label_shapes:read" if name == "test only" else "data.source"
        assert answer[0] == field, (name, answer)
        assert value in answer[1], (name, answer)
        assert remedy in answer[2], (name, answer)
        assert not runs[name].ledger, name
    assert summary["status"] == "finished"
    assert summary["metrics"]["loss"] > 0
