"""The loss whose gradient is clipped: of one record, the mean over its augmented views, the mean over a unit's records.

Whatever is averaged here is averaged within one example, before clipping: the example adds at most C all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpdist.models.augment import Augmentation

#: f(params, example) -> scalar.
ExampleLoss = Callable[[Any, dict[str, Array]], Array]


def over_views(loss: ExampleLoss, augment: Augmentation, views: int, *, randomised: bool) -> ExampleLoss:
    """Return the mean of `loss` over random views of an example (De et al. 2022, section 3.2).

    Args:
        views: K; the gradients of K views are averaged before they are clipped, at K times the work.
        randomised: whether the model is random itself, and wants a key of its own.
    """

    def mean(params: Any, example: dict[str, Array]) -> Array:
        record = {name: value for name, value in example.items() if name != "key"}

        def of_view(key: Array) -> Array:
            for_view, for_model = jax.random.split(key)
            seen = augment(record, for_view)
            return loss(params, seen | {"key": for_model} if randomised else seen)

        if views == 1:
            return of_view(example["key"])
        return jnp.mean(jax.vmap(of_view)(jax.random.split(example["key"], views)))

    return mean


def over_records(loss: ExampleLoss, records: int, mask: str) -> ExampleLoss:
    """Return the mean of `loss` over the records of a unit, whose columns are [records, ...].

    Args:
        mask: the column of bool[records] that says which rows are records.
    """

    def mean(params: Any, example: dict[str, Array]) -> Array:
        rows = {name: value for name, value in example.items() if name not in (mask, "key")}
        if "key" in example:
            rows["key"] = jax.random.split(example["key"], records)
        losses = jax.vmap(loss, in_axes=(None, 0))(params, rows)
        present = example[mask]
        return jnp.sum(jnp.where(present, losses, 0.0)) / jnp.maximum(jnp.sum(present), 1)

    return mean
