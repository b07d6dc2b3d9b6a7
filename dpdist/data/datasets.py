"""Open the dataset that a config's `data` section names: a train and a test source."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.config import Config, Data
from dpdist.config.nearest import did_you_mean
from dpdist.config.plugins import load_function
from dpdist.config.user_errors import users_code
from dpdist.data import arrow, own
from dpdist.data.checks import require_same_columns
from dpdist.data.cifar import CIFAR10, CIFAR100, Format, read_cifar
from dpdist.data.columns import pick
from dpdist.data.idx import read_mnist
from dpdist.data.image_folder import open_image_folder
from dpdist.data.npy import read_npy
from dpdist.data.parts import Parts, choose_parts, split, split_indices
from dpdist.data.sources import ArraySource, Source, Subset
from dpdist.data.table import Reading, given
from dpdist.data.table_files import open_arrow, open_csv, open_hf, open_webdataset
from dpdist.data.text import open_text
from dpdist.data.units import UnitSource, WithoutColumn, require_apart
from dpdist.errors import InputError

#: The `data.source` of a run whose data a Python program has passed to `dpdist.train`.
GIVEN = "python"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The training and test examples of a run."""

    #: The private training examples; their number is public.
    train: Source
    #: Test examples, which the guarantee does not cover; None skips evaluation.
    test: Source | None = None
    #: Number of classes, a public constant that is never read from the labels; None leaves it to `model.classes`.
    classes: int | None = None
    #: Names of the classes in the order of their numbers, public constants too; None if they have no names.
    label_names: tuple[str, ...] | None = None
    #: Number of token ids, a public constant of the tokenizer; None where there are no tokens, or it is not known.
    vocabulary: int | None = None
    #: The dataset's name in summaries and errors.
    name: str

    def __post_init__(self) -> None:
        for part, source in (("train", self.train), ("test", self.test)):
            if source is None and part == "test":
                continue
            if not isinstance(source, Source):
                raise InputError(
                    f"{self.name} ({part})", type(source).__name__, "a source has __len__ and __getitem__(index)."
                )
            if len(source) == 0:
                raise InputError(f"{self.name} ({part})", "0 examples", "at least one is needed.")


def open_dataset(config: Config | Data, dataset: Any = None) -> Dataset:
    """Open the dataset that a config, or its `data` section, names: the train and test examples as training sees them.

    A source that is none of `BUILT_IN` is a `module:function`: it is called with `data.options`, and with `data.path`
    if it takes a `path`. It returns one set of examples, `(train, test)`, or a `Dataset`; each set is anything that
    `dpdist.data.own.as_source` takes. Where there is no test set, `data.test_fraction` of the examples of a built-in
    source, or of the one set that a function returned, is held out by index.

    Args:
        dataset: what such a function would have returned, instead of a source: `data.source` is then `python`.

    Raises:
        InputError: the source, a file, a module or a function is missing or cannot be used; or train and test examples
            have other columns.
    """
    opened = open_unread(config, dataset)
    require_alike(opened)
    return opened


def require_alike(dataset: Dataset) -> None:
    """Check that train and test examples have the same columns, by reading the first of each.

    Raises:
        InputError: they have not.
    """
    records = dataset.train.without_unit() if isinstance(dataset.train, UnitSource) else dataset.train
    require_same_columns(records, dataset.test, dataset.name)


def open_unread(config: Config | Data, dataset: Any = None) -> Dataset:
    """`open_dataset` without a look at any example that is decoded as it is read: the first may be damaged."""
    data = config.data if isinstance(config, Config) else config
    if dataset is not None or data.source == GIVEN:
        if dataset is None:
            raise InputError("data.source", GIVEN, "is for dpdist.train(config, dataset=...) alone; pass it there.")
        opened = _adopted(dataset, data, "dataset")
    elif data.source not in BUILT_IN:
        opened = _adopted(_call(data), data, data.source)
    else:
        open_source = BUILT_IN[data.source]
        known = list(inspect.signature(open_source).parameters)[1:]
        for name in data.options:
            if name not in known:
                raise InputError(
                    f"data.options.{name}",
                    data.options[name],
                    f"{did_you_mean(name, known)}{data.source} takes {', '.join(known) or 'none'}; only a "
                    "module:function source has options of its own.",
                )
        opened = open_source(data, **data.options)
    return opened if data.unit is None else _by_unit(opened, data, data.unit)


def with_given(config: Config) -> Config:
    """`config` as a run records it whose data was passed to `dpdist.train`.

    Raises:
        InputError: it names data of its own, too.
    """
    data = config.data
    for name, value, usual in (("path", data.path, None), ("options", data.options, {}), ("source", data.source, None)):
        if value != usual and not (name == "source" and value in (GIVEN, Data().source)):
            raise InputError(f"data.{name}", value, "a dataset was passed as well; leave one of the two out.")
    return replace(config, data=replace(data, source=GIVEN))


def _by_unit(dataset: Dataset, data: Data, column: str) -> Dataset:
    """The dataset with a training example for each unit, and its test records without the column that names theirs."""
    train, test = dataset.train, dataset.test
    if isinstance(train, Subset) and isinstance(test, Subset) and _is_ours(train, test, data):
        _, unit = np.unique(UnitSource(train.source, column, 1).owner, return_inverse=True)
        held_out = np.isin(unit, split_indices(int(unit.max()) + 1, data)[1])
        train, test = (Subset(train.source, np.flatnonzero(part)) for part in (~held_out, held_out))
    units = UnitSource(train, column, data.records_per_unit or 1)
    if test is not None:
        require_apart(units, test)
        test = WithoutColumn(test, column)
    return replace(dataset, train=units, test=test)


def _is_ours(train: Subset, test: Subset, data: Data) -> bool:
    """Whether it was `split` that parted the records, and not the user."""
    held_out = split_indices(len(train.source), data)[1]
    return train.source is test.source and np.array_equal(test.indices, held_out)


def _digits(data: Data) -> Dataset:
    if data.path is not None:
        raise InputError(
            "data.path", data.path, "digits reads no path; leave it out, or name the source of your files."
        )
    # Read the file without importing scikit-learn, which would cost every process of a job a second and 70 MB.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError("data.source", "digits", "needs scikit-learn; install it: pip install scikit-learn.")
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.int32)
    arrays: dict[str, np.ndarray] = {
        "image": table[:, :64].reshape(-1, 8, 8, 1).astype(np.uint8),
        "label": table[:, 64],
    }
    return _from_arrays(data, arrays, {}, name="digits", classes=10)


def _idx(data: Data) -> Dataset:
    path = _path(data)
    return _from_arrays(data, *read_mnist(path), name=str(path), classes=10)


def _npy(data: Data) -> Dataset:
    path = _path(data)
    return _from_arrays(data, *read_npy(path), name=str(path), classes=None)


def _cifar10(data: Data, checksum: str | None = "official") -> Dataset:
    return _cifar(data, CIFAR10, checksum)


def _cifar100(data: Data, checksum: str | None = "official") -> Dataset:
    return _cifar(data, CIFAR100, checksum)


def _cifar(data: Data, kind: Format, checksum: str | None) -> Dataset:
    path = _path(data)
    train, test, names = read_cifar(path, kind, checksum)
    dataset = _from_arrays(data, train, test, name=str(path), classes=kind.classes)
    return replace(dataset, label_names=names)


def _image_folder(
    data: Data, size: Any = None, mode: str = "rgb", train: str | None = None, test: str | None = None
) -> Dataset:
    return _dataset(
        open_image_folder(_path(data), data, size=size, mode=mode, train=train, test=test), data, pick_now=True
    )


def _columnar(
    open_files: Callable[..., Parts],
    data: Data,
    size: Any = None,
    mode: str = "rgb",
    classes: Any = None,
    train: str | None = None,
    test: str | None = None,
) -> Dataset:
    reading = Reading(size=size, mode=mode, classes=classes, unit=data.unit, given=given(data.columns, data.unit))
    return _dataset(open_files(_path(data), data, reading=reading, train=train, test=test), data)


def _csv(
    data: Data,
    classes: Any = None,
    delimiter: str | None = None,
    train: str | None = None,
    test: str | None = None,
) -> Dataset:
    reading = Reading(classes=classes, unit=data.unit, given=given(data.columns, data.unit))
    return _dataset(open_csv(_path(data), data, reading=reading, delimiter=delimiter, train=train, test=test), data)


def _text(
    data: Data,
    tokenizer: Any = None,
    length: Any = None,
    pack: Any = False,
    classes: Any = None,
    train: str | None = None,
    test: str | None = None,
) -> Dataset:
    options = {"tokenizer": tokenizer, "length": length, "pack": pack, "classes": classes, "train": train, "test": test}
    return _dataset(open_text(_path(data), data, **options), data)


#: Opens a built-in source, given the `data` section and, as keyword arguments, the options that it declares.
BUILT_IN: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "idx": _idx,
    "npy": _npy,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "image_folder": _image_folder,
    "parquet": partial(_columnar, partial(open_arrow, suffixes=arrow.PARQUET)),
    "arrow": partial(_columnar, partial(open_arrow, suffixes=arrow.ARROW)),
    "hf": partial(_columnar, open_hf),
    "webdataset": partial(_columnar, open_webdataset),
    "csv": _csv,
    "text": _text,
}


def _path(data: Data) -> Path:
    if data.path is None:
        raise InputError("data.path", None, f"the source {data.source} needs the path of its files.")
    return Path(data.path)


def _from_arrays(
    data: Data, train: dict[str, np.ndarray], test: dict[str, np.ndarray], *, name: str, classes: int | None
) -> Dataset:
    first = pick(ArraySource(train, name=f"train columns of {name}"), data.columns, f"the train part of {name}")
    if test:
        second = pick(ArraySource(test, name=f"test columns of {name}"), data.columns, f"the test part of {name}")
    else:
        first, second = split(first, data)
    return Dataset(train=first, test=second, classes=classes, name=name)


def _dataset(parts: Parts, data: Data, *, pick_now: bool = False) -> Dataset:
    """The `Dataset` of what a built-in source has read; `pick_now` where it has not seen to `data.columns` itself."""
    columns = data.columns if pick_now else None
    return Dataset(
        train=pick(parts.train, columns, str(data.path)),
        test=None if parts.test is None else pick(parts.test, columns, str(data.path)),
        classes=parts.classes,
        label_names=parts.label_names,
        vocabulary=parts.vocabulary,
        name=str(data.path),
    )


def _call(data: Data) -> Any:
    """What the user's `module:function` returns."""
    function = load_function(data.source, "data.source", list(BUILT_IN))
    signature = inspect.signature(function)
    options = dict(data.options)
    if data.path is not None:
        takes = signature.parameters.get("path")
        if takes is None or takes.kind is takes.VAR_KEYWORD or "path" in options:
            twice = "give it once, here or in data.options" if "path" in options else "which has no parameter `path`"
            raise InputError("data.path", data.path, f"is passed to {data.source}{signature}; {twice}.")
        options["path"] = data.path
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InputError("data.options", data.options, f"{error}; the function takes {signature}.") from None
    with users_code("data.source", data.source, slips_only=True):
        return function(**options)


def _adopted(given: Any, data: Data, name: str) -> Dataset:
    """A `Dataset` of whatever the user has given: a set, `(train, test)`, a `DatasetDict`, or a `Dataset` of ours."""
    names, whole = None, True
    if (parts := own.splits(given)) is not None:
        train, test = choose_parts(parts, train=None, test=None, where=name)
        given = train if test is None else (train, test)
    if isinstance(given, Dataset):
        train, test, names, whole = given.train, given.test, given.label_names, False
    elif isinstance(given, tuple) and len(given) == 2:
        train, test = given
        whole = False
    else:
        train, test = given, None
    if train is None or isinstance(train, tuple):
        raise InputError(
            "data.source", name, f"gave {type(given).__name__}; give (train, test), or one set: {own.WHAT}."
        )
    source = own.as_source(train, data.columns, names, f"{name} (train)", data.unit)
    held_out = None if test is None else own.as_source(test, data.columns, names, f"{name} (test)", data.unit)
    if whole:
        source, held_out = split(source, data)
    if isinstance(given, Dataset):
        return replace(given, train=source, test=held_out)
    names = own.class_names(train, data.columns)
    classes = None if names is None else len(names)
    return Dataset(train=source, test=held_out, classes=classes, label_names=names, name=name)
