"""A source of the user's own with one record that can be erased, and a model whose weights look like the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpdist.data import Source
from dpdist.models import Model

#: Not among the 64 of 1,000 records that are fingerprinted.
VICTIM = 501


def columns() -> tuple[np.ndarray, np.ndarray]:
    """Images of 144 pixels, and their labels."""
    draw = np.random.default_rng(7)
    return draw.standard_normal((1000, 144)).astype(np.float32) / 12, draw.integers(0, 4, 1000).astype(np.int32)


class Records:
    """Random access; once the file `erased` exists, the victim is blank."""

    def __init__(self, erased: str, count: int = 1000) -> None:
        self.image, self.label = (column[:count] for column in columns())
        if Path(erased).exists() and count > VICTIM:
            self.image[VICTIM] = 0

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image[index], "label": self.label[index]}


def records(erased: str) -> tuple[Source, Source | None]:
    """Beside `erased`, the file `test` makes some of the training records test records too; `all`, all of them."""
    parts = {name: count for name, count in (("test", 100), ("all", 1000)) if Path(erased).with_name(name).exists()}
    return Records(erased), Records(erased, max(parts.values())) if parts else None


def linear(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    def init(key: jax.Array) -> dict[str, np.ndarray]:
        return {"w": np.zeros((144, classes), np.float32), "b": np.zeros(classes, np.float32)}

    def apply(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        return example["image"] @ params["w"] + params["b"]

    return Model(init=init, apply=apply)
