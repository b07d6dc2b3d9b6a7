"""The benchmark's tasks: models with the shapes of their data and a usual physical batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpdist.config import Model
from dpdist.models import build, example_loss
from dpdist.program.host import on_the_host

#: C. With random weights gradient norms exceed 1, so most examples are clipped.
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and the shapes of its data."""

    model: Model
    #: Shape and dtype of each column of one example.
    example: Mapping[str, tuple[tuple[int, ...], str]]
    #: Exclusive upper bound of the integers in a column.
    bounds: Mapping[str, int]
    #: Default physical batch size.
    batch: int

    @property
    def classes(self) -> int | None:
        """Number of classes; None where examples have no label, as those of a language model."""
        return self.bounds.get("label")

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of one example, for `dpdist.models.build`."""
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in self.example.items()}

    def examples(self, size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Draw `size` random examples; columns have a leading axis of that length."""
        rng = np.random.default_rng(seed)
        return {
            name: rng.integers(0, self.bounds[name], (size, *shape)).astype(dtype)
            for name, (shape, dtype) in self.example.items()
        }


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The input of every arm: one physical batch with parameters and loss."""

    task: Task
    #: `loss(params, example) -> scalar` of one example.
    loss: Callable[[Any, Any], Array]
    params: Any
    #: Columns with leading axis `size`, on the device, as are the parameters.
    batch: dict[str, Array]
    #: 1 for every example: the batch is full, without padding.
    mask: Array
    clip_norm: float

    @property
    def size(self) -> int:
        """The physical batch size p."""
        return self.mask.shape[0]


def in_dtype(task: Task, dtype: str) -> Task:
    """Return the task with its model's products in `dtype`, as far as the model has that option."""
    if dtype == "float32":  # every model's own
        return task
    return replace(task, model=replace(task.model, options={**task.model.options, "dtype": dtype}))


def problem_of(task: Task, size: int) -> Problem:
    """Make the task's problem with fixed random weights and a fixed random batch of `size` examples."""
    model = build(task.model, example=task.shapes(), classes=task.classes)
    with on_the_host():
        params = model.init(jax.random.key(0))
    device = jax.devices()[0]
    params, batch, mask = jax.device_put((params, task.examples(size), np.ones(size, np.float32)), device)
    return Problem(task=task, loss=example_loss(model), params=params, batch=batch, mask=mask, clip_norm=CLIP_NORM)


def _images(name: str, variant: str | None, *, side: int, channels: int, classes: int, batch: int) -> Task:
    return Task(
        model=Model(name=name, options={} if variant is None else {"variant": variant}),
        example={"image": ((side, side, channels), "uint8"), "label": ((), "int32")},
        bounds={"image": 256, "label": classes},
        batch=batch,
    )


def _photographs(name: str, variant: str, *, batch: int) -> Task:
    return _images(name, variant, side=224, channels=3, classes=100, batch=batch)


def _text(variant: str, *, batch: int, length: int = 128, vocabulary: int = 30522) -> Task:
    return Task(
        model=Model(name="bert", options={"variant": variant, "vocabulary": vocabulary}),
        example={"input_ids": ((length,), "int32"), "label": ((), "int32")},
        bounds={"input_ids": vocabulary, "label": 2},
        batch=batch,
    )


def _next_token(*, length: int, vocabulary: int = 50257, batch: int, **sizes: int) -> Task:
    return Task(
        model=Model(name="gpt2", options={"vocabulary": vocabulary, "positions": length, **sizes}),
        example={"input_ids": ((length,), "int32")},
        bounds={"input_ids": vocabulary},
        batch=batch,
    )


TASKS = {
    "mnist-cnn": _images("cnn", None, side=28, channels=1, classes=10, batch=256),
    "vit-ti": _photographs("vit", "Ti/16", batch=8),
    "vit-s": _photographs("vit", "S/16", batch=4),
    "vit-b": _photographs("vit", "B/16", batch=4),
    "vit-l": _photographs("vit", "L/16", batch=4),
    "r50x1": _photographs("bit_resnet", "50x1", batch=4),
    "bert-mini": _text("mini", batch=16),
    "bert-base": _text("base", batch=4),
    "gpt2-small": _next_token(length=1024, batch=1),
    "gpt2-tiny": _next_token(length=32, vocabulary=1000, batch=8, width=64, depth=2, heads=2),
}
