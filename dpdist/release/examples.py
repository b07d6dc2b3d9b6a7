"""The examples that a recipient wants predictions for, from one word on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dpdist.config import Data, from_dict
from dpdist.config.constraints import expand_home
from dpdist.config.file import read
from dpdist.data import ArraySource, Dataset, Source, Subset, open_dataset
from dpdist.data.datasets import BUILT_IN
from dpdist.data.npy import read_columns
from dpdist.data.units import UnitSource, WithoutColumn
from dpdist.errors import InputError

Part = Literal["all", "train", "test"]
#: Built-in sources by the suffix of their file, those that there are.
_BY_SUFFIX = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_FORMS = (
    "give a .npz of columns, a .npy of the one column that the model reads, a directory of .npy columns, SOURCE:PATH "
    "with a built-in source ({sources}), a YAML file with a `data` section, or module:function of your own."
)


def open_examples(spec: str, *, known: Data, columns: tuple[str, ...], part: Part = "all") -> Source:
    """Open what `spec` names.

    Args:
        known: the `data` section that the model was trained with; its settings are used again where `spec` names the
            same source.
        columns: those that the model reads.
        part: of a dataset with a train and a test part. `all` is both, in the order of the files where they are one.

    Raises:
        InputError: it names nothing that can be read.
    """
    path = Path(expand_home(spec, "DATA"))
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _part(open_dataset(_data_section(path)), part)
    if path.suffix == ".npy" and path.is_file():
        return ArraySource({_only(columns, path): read_columns(path)[path.stem]}, name=str(path))
    if (path.suffix == ".npz" and path.is_file()) or (path.is_dir() and any(path.glob("*.npy"))):
        return _columns(path, part)
    return _part(open_dataset(_data_of(spec, path, known, columns)), part)


def _data_section(path: Path) -> Data:
    tree = read(path)
    if "data" not in tree:
        raise InputError("DATA", str(path), "has no `data` section; write one as for training.")
    return from_dict({"data": tree["data"], "privacy": {"enabled": False}, "training": {"steps": 1}}).data


def _only(columns: tuple[str, ...], path: Path) -> str:
    if len(columns) != 1:
        remedy = f"the model reads the columns {', '.join(columns)}; put them into one .npz under these names."
        raise InputError("DATA", str(path), remedy)
    return columns[0]


def _columns(path: Path, part: Part) -> Source:
    """Columns under their own names, or, as for training, under `train_` and `test_`."""
    arrays = read_columns(path)
    if not arrays:
        raise InputError("DATA", str(path), "holds no columns; save arrays under the names of the model's columns.")
    if any(not name.startswith(("train_", "test_")) for name in arrays):
        if part != "all":
            raise InputError("--part", part, f"{path} has no parts: its columns are not called train_... and test_....")
        return ArraySource(arrays, name=str(path))
    kinds = ("train", "test") if part == "all" else (part,)
    parts = [
        {name.removeprefix(f"{kind}_"): array for name, array in arrays.items() if name.startswith(f"{kind}_")}
        for kind in kinds
    ]
    sources = [ArraySource(columns, name=f"{path}") for columns in parts if columns]
    if not sources:
        raise InputError("--part", part, f"{path} has no such part; it has {', '.join(arrays)}.")
    return sources[0] if len(sources) == 1 else _Joined(*sources)


def _data_of(spec: str, path: Path, known: Data, columns: tuple[str, ...]) -> Data:
    """The `data` section that SOURCE:PATH, a path or module:function stands for."""
    name, colon, place = spec.partition(":")
    if spec in BUILT_IN and not path.exists():
        name, colon, place = spec, ":", ""
    elif not (colon and name in BUILT_IN):
        name, place = "", spec
        if path.exists():
            fits = known.source in BUILT_IN and known.source != "digits"
            name = next((n for n in (_BY_SUFFIX.get(path.suffix), known.source if fits else None) if n in BUILT_IN), "")
        elif colon and place:
            return known if spec == known.source else Data(source=spec)
    if not name:
        missing = "" if path.exists() else "there is no such file; "
        raise InputError("DATA", spec, missing + _FORMS.format(sources=", ".join(BUILT_IN)))
    settings: dict[str, Any] = {"source": name, "path": place or None}
    if known.source == name and known.columns is not None and set(columns) <= set(known.columns):
        read = {column: known.columns[column] for column in columns}  # new examples have neither labels nor owners
        settings |= {"columns": read, "unit": None, "records_per_unit": None}
    return dataclasses.replace(known if known.source == name else Data(), **settings)


def _part(dataset: Dataset, part: Part) -> Source:
    # One prediction a record, whoever has it.
    train = dataset.train.source if isinstance(dataset.train, UnitSource) else dataset.train
    test = dataset.test.source if isinstance(dataset.test, WithoutColumn) else dataset.test
    if part == "train":
        return train
    if part == "test":
        if test is None:
            raise InputError("--part", part, f"{dataset.name} has no test examples.")
        return test
    if test is None:
        return train
    if isinstance(train, Subset) and isinstance(test, Subset) and train.source is test.source:
        return train.source
    return _Joined(train, test)


class _Joined:
    """The examples of one source after those of another."""

    def __init__(self, first: Source, second: Source) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, index: int) -> Any:
        length = len(self._first)
        return self._first[index] if index < length else self._second[index - length]
