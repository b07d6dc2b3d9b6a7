"""Canaries: records whose clipped gradient has norm C in a direction that no other record has, in a linear model.

The model has two leaves of `width` parameters each. A record has a `place` i and a `value` v, and the loss
v (a_i - b_i) / sqrt(2): its gradient has norm |v|, whatever the parameters are, and touches both leaves, so that noise
which the leaves share would cancel in its direction. A value of 0 is a null record: it adds exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dpdist.data.sources import ArraySource
from dpdist.models import Model

#: What a config names the model and the data source by.
MODEL, COINS = "dpdist.audit.canary:pairs", "dpdist.audit.canary:with_coins"


def pairs(*, example: dict[str, jax.ShapeDtypeStruct], width: int) -> Model:
    """The model, whose parameters begin at 0."""

    def init(key: Array) -> dict[str, np.ndarray]:
        return {"a": np.zeros(width, np.float32), "b": np.zeros(width, np.float32)}

    def apply(params: Mapping[str, Array], example: Mapping[str, Array]) -> Array:
        place = example["place"]
        return example["value"] * (jnp.take(params["a"], place) - jnp.take(params["b"], place)) / math.sqrt(2)

    def loss(outputs: Array, example: Mapping[str, Array]) -> Array:
        return outputs

    return Model(init=init, apply=apply, loss=loss)


def records(values: np.ndarray, places: np.ndarray) -> ArraySource:
    """Training examples of these values at these places."""
    return ArraySource({"value": values.astype(np.float32), "place": places.astype(np.int32)})


def projections(params: Mapping[str, Any]) -> Float64[np.ndarray, " width"]:
    """The parameters along each place's direction, a unit vector."""
    a, b = (np.asarray(params[name], np.float64) for name in ("a", "b"))
    return (a - b) / math.sqrt(2)


def projection(params: Mapping[str, Any], place: int) -> float:
    """The parameters along one place's direction."""
    a, b = (float(np.asarray(params[name])[place]) for name in ("a", "b"))
    return (a - b) / math.sqrt(2)


def with_coins(path: str) -> tuple[ArraySource, None]:
    """A data source: for each coin (bool[m], .npy) in the file, a canary at a place of its own, or a null record.

    The canary's gradient is far longer than any clipping norm that the audit trains with.
    """
    coins = np.load(path)
    return records(np.where(coins, 16.0, 0.0), np.arange(len(coins))), None
