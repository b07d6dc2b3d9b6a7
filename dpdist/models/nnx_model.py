"""Flax NNX modules as models of one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model

COMPUTE_DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str) -> DTypeLike:
    """The dtype of a model's products, by name; its parameters are float32 all the same."""
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; there are {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], prepare: Callable[[dict[str, Array]], Any]) -> Model:
    """A `Model` from an NNX module of one example.

    Args:
        build: makes the module from an `nnx.Rngs`. All its state must be `nnx.Param`: anything else, such as
            batch statistics, would mix examples.
        prepare: one example to the module's input.
    """
    graph, template = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    strangers = {
        type(leaf).__name__
        for leaf in jax.tree.leaves(template, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param)
    }
    if strangers:
        raise ValueError(
            f"the module holds {', '.join(sorted(strangers))}; DP-SGD needs nnx.Param alone "
            "(batch statistics mix examples)"
        )

    def init(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, example: dict[str, Array]) -> Array:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(prepare(example))

    # Compiled as a whole, it starts in half the time of one small program after the other.
    return Model(init=jax.jit(init), apply=apply)
