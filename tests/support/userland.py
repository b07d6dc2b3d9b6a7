"""What a user brings to a run: data, models, and mishaps. Every process finds it in its working directory.

PACE, in the environment, slows reading down so that a test can act between two steps; PACE_TEST slows evaluation and
PACE_START what comes before the first step. Seconds, or the name of a file that holds them until the test removes it.
They are no part of the config: paced or not, it is the same run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist.data import ArraySource, Source
from dpdist.models import Model

Columns = dict[str, np.ndarray]


def pace(name: str) -> float:
    """Seconds to wait at each turn of what `name` slows down."""
    value = os.environ.get(name, "0")
    if "/" not in value:
        return float(value)
    return float(Path(value).read_text()) if Path(value).exists() else 0.0


def columns(size: int, seed: int) -> Columns:
    """Four classes with noise: `image` float32[size, 12], `label` int32[size]."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 4, size).astype(np.int32)
    image = np.eye(4, 12, dtype=np.float32)[label] * 2 + draw.standard_normal((size, 12)).astype(np.float32)
    return {"image": image, "label": label}


def train_columns() -> Columns:
    return columns(1000, seed=1)


def test_columns() -> Columns:
    """203 examples: no multiple of devices times batch size."""
    return columns(203, seed=2)


class Paced(ArraySource):
    """Arrays, read slowly."""

    def __init__(self, columns: Columns, by: str) -> None:
        super().__init__(columns)
        self.by = by

    def take(self, indices: np.ndarray) -> Columns:
        time.sleep(pace(self.by))
        return super().take(indices)


class Items:
    """Random access and nothing else; what `odd` holds for an index is called instead of reading it."""

    def __init__(self, columns: Columns, odd: Mapping[int, Callable[[], Any]] | None = None) -> None:
        self.columns, self.odd = columns, odd or {}

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> Any:
        if index in self.odd:
            return self.odd[index]()
        time.sleep(pace("PACE") / 64)
        return {name: values[index] for name, values in self.columns.items()}


def arrays() -> tuple[Source, Source]:
    return Paced(train_columns(), "PACE"), Paced(test_columns(), "PACE_TEST")


def arrays_at(path: str) -> tuple[Source, Source]:
    """The same from any place."""
    return arrays()


def items() -> tuple[Source, Source]:
    return Items(train_columns()), Items(test_columns())


class Noting(ArraySource):
    """Arrays; which rows are read together is written to a file, a JSON list a line."""

    def __init__(self, columns: Columns, file: str) -> None:
        super().__init__(columns)
        self.file = file

    def take(self, indices: np.ndarray) -> Columns:
        with Path(self.file).open("a") as file:
            file.write(json.dumps(indices.tolist()) + "\n")
        return super().take(indices)


def noting(file: str) -> tuple[Source, None]:
    return Noting(train_columns(), file), None


def pictures() -> tuple[Source, None]:
    """64 records of 96 x 96 pixels: sums over their pixels are long enough for XLA to cut them into parts."""
    draw = np.random.default_rng(3)
    image = draw.integers(0, 256, (64, 96, 96, 3), np.uint8)
    return ArraySource({"image": image, "label": draw.integers(0, 4, 64).astype(np.int32)}), None


def failing(index: int) -> tuple[Source, None]:
    """Reading example `index` raises an error that quotes it."""

    def fail() -> None:
        raise ValueError("record of Alice Example, born 1980")

    return Items(train_columns(), {index: fail}), None


def leaking(run: str) -> tuple[Source, None]:
    """Reading the examples raises an error that tells the secret of the run."""

    def fail() -> None:
        raise ValueError(f"variables: key={(Path(run) / 'private/secret.key').read_bytes()!r}")

    return Items(train_columns(), {index: fail for index in range(100, 900)}), None


def malformed(index: int) -> tuple[Source, None]:
    """Example `index` has another shape than all the others."""
    return Items(train_columns(), {index: lambda: {"image": np.zeros(3), "label": np.int32(0)}}), None


def wide(value: float) -> tuple[Source, None]:
    """Arrays of 64 bits, with one such value in a column."""
    train = train_columns() | {"number": np.zeros(1000, np.asarray(value).dtype)}
    train["number"][999] = value
    return ArraySource(train), None


def bad_label() -> tuple[Source, None]:
    """As `bad_record`, in arrays: the label is out of range."""
    train = columns(20_000, seed=1)
    train["label"][int(os.environ["BAD_RECORD"])] = 500_000_123
    return ArraySource(train), None


def bad_record(kind: str) -> tuple[Source, None]:
    """20,000 examples, of which the one that BAD_RECORD names is wrong and holds 5,000,000,123 or `Alice Example`.

    In the environment, as the config is public.
    """
    train, index = columns(20_000, seed=1), int(os.environ["BAD_RECORD"])
    good, large = {name: values[index] for name, values in train.items()}, 5_000_000_123

    def fail() -> None:
        raise ValueError(f"record {index} of Alice Example has {large}")

    if kind == "wide":  # all are of 64 bits, and one does not fit into 32
        train["number"] = np.arange(20_000)
        return Items(train, {index: lambda: good | {"number": np.int64(large)}}), None
    if kind == "infinite":
        train["number"] = np.zeros(20_000)
        return Items(train, {index: lambda: good | {"number": np.float64(5.000000123e300)}}), None
    odd: dict[str, Callable[[], Any]] = {
        "raises": fail,
        "text": lambda: good | {"image": "Alice Example"},
        "column": lambda: good | {"Alice Example": large},
        "dtype": lambda: good | {"label": np.int64(large)},
        "shape": lambda: good | {"image": np.zeros(large // 10**6, np.float32)},
        "ragged": lambda: good | {"image": [[large], [1, 2]]},
        "tuple": lambda: ("Alice Example", large),
    }
    return Items(train, {index: odd[kind]}), None


def with_nans(rows: list[int]) -> tuple[Source, Source]:
    """The features of the examples `rows` are NaN."""
    train = train_columns()
    train["image"][rows] = np.nan
    return ArraySource(train), ArraySource(test_columns())


def small(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """One hidden layer; its initial parameters come from NumPy, since compiling JAX's draws takes seconds."""
    width, draw = example["image"].shape[0], np.random.default_rng(0)

    def init(key: jax.Array) -> dict[str, np.ndarray]:
        time.sleep(pace("PACE_START"))
        weights = {"a": draw.standard_normal((width, 16)) / 4, "c": draw.standard_normal((16, classes)) / 4}
        biases = {"b": np.zeros(16), "d": np.zeros(classes)}
        return {name: value.astype(np.float32) for name, value in (weights | biases).items()}

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        return jnp.tanh(example["image"] @ params["a"] + params["b"]) @ params["c"] + params["d"]

    return Model(init=init, apply=apply)


def logits(params: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """`small` in NumPy and float64."""
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return np.tanh(images @ weights["a"] + weights["b"]) @ weights["c"] + weights["d"]


def dropout(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """`small`, with half of each training example's features dropped."""
    plain = small(example=example, classes=classes)

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        image = example["image"]
        if "key" in example:
            image = jnp.where(jax.random.bernoulli(example["key"], 0.5, image.shape), image * 2, 0)
        return plain.apply(params, {"image": image})

    return Model(init=plain.init, apply=apply, randomised=True)


def pooling(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """A convolution, and the mean over all pixels."""
    channels, draw = example["image"].shape[-1], np.random.default_rng(0)

    def init(key: jax.Array) -> dict[str, np.ndarray]:
        weights = {"a": draw.standard_normal((3, 3, channels, 32)) / 8, "b": draw.standard_normal((32, classes)) / 8}
        return {name: value.astype(np.float32) for name, value in weights.items()}

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        image = example["image"].astype(jnp.float32)[None] / 255
        hidden = jax.lax.conv_general_dilated(
            image, params["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.tanh(hidden), (0, 1, 2)) @ params["b"]

    return Model(init=init, apply=apply)


def searching(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """`small`, whose logits are scaled by a search: a loop without a derivative."""
    plain = small(example=example, classes=classes)

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        logits = plain.apply(params, example)
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x / 2, logits)

    return Model(init=plain.init, apply=apply)


def no_model(*, example: dict[str, jax.ShapeDtypeStruct]) -> str:
    return "a string"


# Other tasks than to classify


def quantities() -> tuple[Source, Source]:
    """`image` float32[12] and two numbers to predict from it."""
    weights = np.random.default_rng(5).standard_normal((12, 2)).astype(np.float32)
    parts = (train_columns(), test_columns())
    train, test = ({"image": part["image"], "target": np.tanh(part["image"] @ weights)} for part in parts)
    return ArraySource(train), ArraySource(test)


def yes_or_no() -> tuple[Source, Source]:
    """Whether the class is one of the first two."""
    train, test = (part | {"label": part["label"] < 2} for part in (train_columns(), test_columns()))
    return ArraySource(train), ArraySource(test)


def owned(by: int = 1) -> tuple[Source, Source]:
    """1,000 records of 300 people, some of whom have many; the test records are of others. `by` live in a house."""
    owner = np.minimum(np.random.default_rng(8).zipf(1.3, 1000) % 300, 299).astype(np.int32) // by
    others = test_columns()
    others |= {"who": np.arange(1000, 1000 + len(others["label"]), dtype=np.int32)}
    return ArraySource(train_columns() | {"who": owner}), ArraySource(others)


def sentences(vocabulary: int = 12) -> tuple[Source, Source]:
    """Eight tokens of which each is mostly the one before plus one; the last ones may be padding."""
    draw = np.random.default_rng(6)

    def some(size: int) -> ArraySource:
        steps = np.where(draw.random((size, 8)) < 0.9, 1, draw.integers(0, vocabulary, (size, 8)))
        tokens = (steps.cumsum(axis=1) + draw.integers(0, vocabulary, (size, 1))) % vocabulary
        mask = np.arange(8) < draw.integers(2, 9, (size, 1))
        return ArraySource({"input_ids": np.where(mask, tokens, 0).astype(np.int32), "attention_mask": mask})

    return some(1000), some(203)


def rated_sentences() -> tuple[Source, None]:
    """Sentences whose label is their first token, of four."""
    rows = sentences(4)[0].take(np.arange(64))  # type: ignore[attr-defined]
    return ArraySource(rows | {"label": rows["input_ids"][:, 0]}), None


def bigrams(*, vocabulary: int = 12) -> Model:
    """A language model that knows one token of the past. An id outside the vocabulary makes its outputs NaN."""

    def init(key: jax.Array) -> dict[str, np.ndarray]:
        return {"table": np.zeros((vocabulary, vocabulary), np.float32)}

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        return jnp.take(params["table"], example["input_ids"], axis=0)

    return Model(init=init, apply=apply)


def confidence(outputs: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    """A metric: the largest probability."""
    return jnp.max(jax.nn.softmax(outputs))


def own_cross_entropy(outputs: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    """The cross entropy, as a loss of the user's own."""
    return -jax.nn.log_softmax(outputs)[example["label"]]


def constant(outputs: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    """A loss that no parameter changes."""
    return jnp.float32(1.0)


def weighed(outputs: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    """A loss that needs no label."""
    return jnp.sum(jnp.square(outputs)) + jnp.mean(example["image"])
