"""What training leaves behind: the model, its parameters, and what is known of both. It predicts on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from dpdist import models
from dpdist.config import Config
from dpdist.config.nearest import did_you_mean
from dpdist.data.sources import for_devices
from dpdist.errors import InputError
from dpdist.models.tasks import task_of

#: Examples that are computed at once, unless told otherwise.
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a model takes and what its outputs mean; all of it public."""

    #: Shape and dtype of one example, by column, as training saw them; labels are among them.
    example: dict[str, jax.ShapeDtypeStruct]
    #: Number of classes; None where there are none, or none that is known.
    classes: int | None
    #: Names of the classes in the order of their numbers, if they have names.
    class_names: tuple[str, ...] | None

    def to_record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "example": {name: [list(x.shape), x.dtype.name] for name, x in self.example.items()},
            "classes": self.classes,
            "class_names": None if self.class_names is None else list(self.class_names),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Signature:
        """The inverse of `to_record`; checkpoints have the same fields, and before there were class names, two of them.

        Raises:
            KeyError, TypeError, ValueError: it is no such record.
        """
        names = record.get("class_names")
        return cls(
            example={
                name: jax.ShapeDtypeStruct(tuple(map(int, shape)), jnp.dtype(dtype))
                for name, (shape, dtype) in record["example"].items()
            },
            classes=record["classes"],
            class_names=None if names is None else tuple(map(str, names)),
        )


@dataclass(frozen=True)
class TrainedRun:
    """A run at its newest checkpoint, or an export of one.

    Attributes:
        config: of the run; of an export, without paths and what concerns the machines.
        params: the released parameters (their average where one was kept).
        step: steps taken.
        privacy: the privacy statement of `params`, from `release.statement`: `guarantee`, epsilon, delta, ...
        signature: what `predict` takes, and the classes.
    """

    config: Config
    params: Any
    step: int
    privacy: dict[str, Any]
    signature: Signature
    _model: models.Model

    def predict(self, examples: Mapping[str, np.ndarray], *, batch_size: int = BATCH) -> np.ndarray:
        """Outputs of the model, such as logits [n, classes], of any number of examples given by column.

        Args:
            examples: e.g. `{"image": uint8[n, 8, 8, 1]}`, in the shapes and dtypes of training. Labels and whatever
                else the model does not read are not needed, and not looked at.
            batch_size: examples that are computed at once.

        Raises:
            InputError: a column that the model reads is missing, or has another shape or dtype than in training.
        """
        if batch_size < 1:
            raise InputError("batch_size", batch_size, "give at least 1.")
        columns = self.checked(examples)
        count = len(next(iter(columns.values()))) if columns else 0
        if count == 0:
            return np.zeros((0, *self.outputs.shape), self.outputs.dtype)
        size = min(batch_size, count)
        parts = []
        for start in range(0, count, size):
            batch = {name: values[start : start + size] for name, values in columns.items()}
            taken = len(next(iter(batch.values())))
            # One shape is compiled: the last batch is filled up.
            batch = {name: np.resize(v, (size, *v.shape[1:])) if taken < size else v for name, v in batch.items()}
            parts.append(np.asarray(self._apply(self.params, batch))[:taken])
        return np.concatenate(parts)

    def checked(self, examples: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The columns that the model reads, in the dtypes of training.

        Raises:
            InputError: as `predict`.
        """
        if not isinstance(examples, Mapping):
            remedy = f"give a dict of columns, {{{', '.join(f'{name!r}: ...' for name in self.columns)}}}."
            raise InputError("examples", type(examples).__name__, remedy)
        columns: dict[str, np.ndarray] = {}
        for name in self.columns:
            expected = self.signature.example[name]
            wanted = f"{expected.dtype.name}[n{''.join(f',{axis}' for axis in expected.shape)}]"
            if name not in examples:
                there = ", ".join(map(str, examples)) or "none"
                hint = did_you_mean(name, map(str, examples))
                raise InputError(f"column {name!r}", there, f"is missing; {hint}the model needs it as {wanted}.")
            values = for_devices(repr(name), np.asarray(examples[name]))
            found = f"{values.dtype.name}[{','.join(map(str, values.shape))}]"
            if values.shape == expected.shape:
                raise InputError(f"column {name!r}", found, "is one example; give an axis of examples: values[None].")
            if values.shape[1:] != expected.shape or values.ndim == 0:
                raise InputError(f"column {name!r}", found, f"the model was trained on {wanted}; give that shape.")
            if values.dtype != expected.dtype:
                remedy = (
                    f"the model was trained on {wanted}; give the values as they were in training, neither scaled nor "
                    "rounded, and in that dtype."
                )
                raise InputError(f"column {name!r}", found, remedy)
            columns[name] = values
        if len(lengths := {name: len(values) for name, values in columns.items()}) and len({*lengths.values()}) > 1:
            raise InputError("examples", lengths, "the columns differ in length; each needs one row an example.")
        return columns

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the model reads."""
        example = self.signature.example
        traced = jax.make_jaxpr(self._model.apply)(self._shapes, example)
        read = {var for eqn in traced.jaxpr.eqns for var in eqn.invars if isinstance(var, jax.extend.core.Var)}
        read |= {var for var in traced.jaxpr.outvars if isinstance(var, jax.extend.core.Var)}
        inputs = traced.jaxpr.invars[-len(example) :] if example else []
        return tuple(name for name, var in zip(sorted(example), inputs, strict=True) if var in read)

    @cached_property
    def outputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the outputs of one example."""
        return jax.eval_shape(self._model.apply, self._shapes, self.signature.example)

    @cached_property
    def task(self) -> str:
        """The name of what the outputs mean, such as `classification`."""
        return task_of(self.config.model).name

    @property
    def _shapes(self) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)

    @cached_property
    def _apply(self) -> Callable[[Any, dict[str, np.ndarray]], Any]:
        example = self.signature.example

        def one(params: Any, columns: dict[str, Any]) -> Any:
            unread = {name: jnp.zeros(x.shape, x.dtype) for name, x in example.items() if name not in columns}
            return self._model.apply(params, unread | columns)

        return jax.jit(jax.vmap(one, in_axes=(None, 0)))
