"""Which parameters do not train, and the shorter format that their matrices may be kept in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.errors import InputError
from dpdist.mechanism.clipping.paths import matching, paths_of
from dpdist.models import Model


def frozen_paths(chosen: config_module.Model, params: Any) -> frozenset[str]:
    """Paths of the parameters that `model.trainable` leaves out.

    Where it is null, all train; but with adapters (`model.lora`) these alone, and the classifier `head`: a new one is
    all zeros, and behind it nothing would have a gradient.

    Raises:
        InputError: a pattern matches no parameter, or there are adapters of which none trains.
    """
    paths, patterns = frozenset(paths_of(params)), chosen.trainable
    if patterns is None:
        adapters = ["*lora_a", "*lora_b", *(["head/*"] if any(path.startswith("head/") for path in paths) else [])]
        patterns = ["*"] if chosen.lora is None else adapters
    try:
        moving = matching(params, patterns)
    except ValueError as error:
        raise InputError("model.trainable", patterns, f"{error}.") from None
    if chosen.lora is not None and not any(path.endswith(("lora_a", "lora_b")) for path in moving):
        remedy = "no adapter of model.lora is among these; add '*lora_a' and '*lora_b', or leave model.lora out."
        raise InputError("model.trainable", patterns, remedy)
    return paths - moving


def with_frozen_in(model: Model, dtype: Any, chosen: config_module.Model) -> Model:
    """Return `model` with its frozen matrices kept in `dtype`; computed with as before, after a cast.

    Vectors, such as the scales of norms, stay as they are: they are small, and precision matters there.

    Raises:
        InputError: every parameter trains, or `model.trainable` matches nothing.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    frozen = frozen_paths(chosen, shapes)
    if not frozen:
        raise InputError(
            "model.frozen_dtype", chosen.frozen_dtype, "every parameter trains; set model.trainable or model.lora."
        )
    short = {
        path
        for path, leaf in zip(paths_of(shapes), jax.tree.leaves(shapes), strict=True)
        if path in frozen and leaf.ndim > 1
    }

    def cast(params: Any, to: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        paths = paths_of(params)
        return jax.tree.unflatten(
            structure, [leaf.astype(to) if path in short else leaf for path, leaf in zip(paths, leaves, strict=True)]
        )

    def init(key: Array) -> Any:
        return cast(model.init(key), dtype)

    def apply(params: Any, example: dict[str, Array]) -> Array:
        return model.apply(cast(params, jnp.float32), example)

    return dataclasses.replace(model, init=init, apply=apply)
