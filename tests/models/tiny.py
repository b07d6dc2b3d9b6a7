"""Models small enough for the repository: `make_golden.py` builds them with PyTorch, the tests with dpdist."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from dpdist import config, models

GOLDEN = Path(__file__).parent / "golden"
CLASSES = 5
#: Model options by name; `make_golden.py` builds the other libraries' models with the same numbers.
OPTIONS: dict[str, dict[str, Any]] = {
    "vit": {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "patch": 4, "image_size": 16},
    "bit_resnet": {"layers": [1, 2], "channels": [128, 128], "image_size": 40},
    "bert": {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "vocabulary": 50, "positions": 12},
    "gpt2": {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "vocabulary": 50, "positions": 12},
    "llama": {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "vocabulary": 50, "positions": 12}
    | {"theta": 100.0, "epsilon": 1e-5},
    "gemma": {"width": 32, "depth": 2, "heads": 4, "kv_heads": 1, "mlp": 48, "vocabulary": 50, "positions": 12}
    | {"head_width": 12, "style": "gemma"},
}
#: Models of these names have another in dpdist.
BUILT_AS = {"gemma": "llama"}
LANGUAGE_MODELS = ("gpt2", "llama", "gemma")


def columns(name: str) -> dict[str, np.ndarray]:
    """Return four examples for a model, by column."""
    random = np.random.default_rng(7)
    if name in ("vit", "bit_resnet"):
        size = OPTIONS[name]["image_size"]
        return {"image": random.integers(0, 256, (4, size, size, 3), dtype=np.uint8)}
    tokens = {
        "input_ids": random.integers(0, 50, (4, 10), dtype=np.int32),
        "attention_mask": (np.arange(10) < np.array([[10], [7], [1], [9]])).astype(np.int32),
    }
    segments = {"token_type_ids": random.integers(0, 2, (4, 10), dtype=np.int32)}
    return tokens if name in LANGUAGE_MODELS else tokens | segments


def next_token_loss(logits: Any, example: dict[str, Any]) -> Any:
    """Return the mean cross entropy of every next token that is no padding."""
    counted = example["attention_mask"][1:].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], example["input_ids"][1:])
    return jnp.sum(losses * counted) / jnp.maximum(1.0, jnp.sum(counted))


def build(name: str, *, classes: int = CLASSES, data: dict[str, np.ndarray] | None = None, **options: Any) -> Any:
    """Build the tiny model of a name, with additional options, for examples like those in `data`."""
    rows = columns(name) if data is None else data
    example = {column: jax.ShapeDtypeStruct(values.shape[1:], values.dtype) for column, values in rows.items()}
    chosen = config.Model(name=BUILT_AS.get(name, name), options=OPTIONS[name] | options)
    model = models.build(chosen, example=example, classes=classes)
    return dataclasses.replace(model, loss=next_token_loss) if name in LANGUAGE_MODELS else model


@cache
def compiled(apply: Any) -> Any:
    """Return `apply` for many examples, compiled once for all tests."""
    return jax.jit(jax.vmap(apply, in_axes=(None, 0)))


def logits(model: models.Model, params: Any, data: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [n, classes] of examples given by column."""
    return np.asarray(compiled(model.apply)(params, data))


def golden(name: str) -> tuple[Path, dict[str, np.ndarray], np.ndarray]:
    """Return the weights' file, the examples, and the logits that `make_golden.py` got from the other library."""
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    return GOLDEN / f"{name}.safetensors", expected, expected.pop("logits")


@cache
def golden_model(name: str) -> tuple[models.Model, Any]:
    """Return the model and its golden weights."""
    model = build(name, pretrained=str(GOLDEN / f"{name}.safetensors"))
    return model, model.init(jax.random.key(0))


def size(params: Any) -> int:
    """Count the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
