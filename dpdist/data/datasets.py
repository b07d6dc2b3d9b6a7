"""Open the dataset that a config's `data` section names: a train and a test source."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpdist.config import Data
from dpdist.config.plugins import load_function
from dpdist.config.user_errors import users_code
from dpdist.data.cifar import CIFAR10, CIFAR100, Format, read_cifar
from dpdist.data.idx import read_mnist
from dpdist.data.npy import read_npy
from dpdist.data.sources import ArraySource, Source, Subset, schema
from dpdist.errors import InputError


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
    #: The dataset's name in summaries and errors.
    name: str

    def __post_init__(self) -> None:
        for part, source in (("train", self.train), ("test", self.test)):
            if source is None and part == "test":
                continue
            if isinstance(source, Mapping) or not isinstance(source, Source):
                raise InputError(
                    f"{self.name} ({part})",
                    type(source).__name__,
                    "a source has __len__ and __getitem__(index); wrap a dict of arrays in dpdist.data.ArraySource.",
                )
            if len(source) == 0:
                raise InputError(f"{self.name} ({part})", "0 examples", "at least one is needed.")


def open_dataset(data: Data) -> Dataset:
    """Open the dataset that the config's `data` section names.

    `digits` (bundled with scikit-learn), `idx`, `npy`, `cifar10` and `cifar100` are built in. Any other source is a
    `module:function`: it is called with `data.options` and must return a `Dataset` or `(train, test)`, which are used
    unchanged. From a built-in source without a test set, `data.test_fraction` of the examples is held out by index.

    Raises:
        InputError: the source, a file, a module or a function is missing or cannot be used.
    """
    if data.source not in BUILT_IN:
        return _from_function(data)
    open_source = BUILT_IN[data.source]
    known = list(inspect.signature(open_source).parameters)[1:]
    if data.options.keys() - set(known):
        raise InputError(
            "data.options",
            data.options,
            f"{data.source} takes {', '.join(known) or 'none'}; only a module:function source has options of its own.",
        )
    return open_source(data, **data.options)


def split_indices(length: int, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Split `length` indices into train and test by a public permutation; both parts are sorted.

    The permutation is seeded by `data.split_seed`, and its first `data.test_fraction`, rounded up, is the test set. It
    sorts Philox words, because NumPy guarantees their stream across versions; it does not guarantee
    `Generator.permutation`.
    """
    order = np.argsort(np.random.Philox(data.split_seed).random_raw(length), kind="stable").astype(np.int64)
    held_out = math.ceil(length * data.test_fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _digits(data: Data) -> Dataset:
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


#: Opens a built-in source, given the `data` section and, as keyword arguments, the options that it declares.
BUILT_IN: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "idx": _idx,
    "npy": _npy,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}


def _path(data: Data) -> Path:
    if data.path is None:
        raise InputError("data.path", None, f"the source {data.source} needs the path of its files.")
    return Path(data.path)


def _from_arrays(
    data: Data, train: dict[str, np.ndarray], test: dict[str, np.ndarray], *, name: str, classes: int | None
) -> Dataset:
    source = ArraySource(train, name=f"train columns of {name}")
    if not test:
        kept, held_out = split_indices(len(source), data)
        return Dataset(train=Subset(source, kept), test=Subset(source, held_out), classes=classes, name=name)
    test_source = ArraySource(test, name=f"test columns of {name}")
    expected, found = (
        {column: tuple(values.shape[1:]) for column, values in part.arrays.items()} for part in (source, test_source)
    )
    if found != expected:
        raise InputError(
            f"test columns of {name}",
            schema(test),
            f"the train columns are {schema(train)}; both need the same names, and rows of the same shape.",
        )
    return Dataset(train=source, test=test_source, classes=classes, name=name)


def _from_function(data: Data) -> Dataset:
    function = load_function(data.source, "data.source", list(BUILT_IN))
    signature = inspect.signature(function)
    try:
        signature.bind(**data.options)
    except TypeError as error:
        raise InputError("data.options", data.options, f"{error}; the function takes {signature}.") from None
    with users_code("data.source", data.source, slips_only=True):
        result = function(**data.options)
    if isinstance(result, Dataset):
        return result
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(
            "data.source",
            data.source,
            f"returned {type(result).__name__}; return a dpdist.data.Dataset or (train, test).",
        )
    return Dataset(train=result[0], test=result[1], name=data.source)
