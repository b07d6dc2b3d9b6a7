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
    """Return the dtype of a model's matrix products by name; its parameters are float32 in any case.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; there are {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], prepare: Callable[[dict[str, Array]], Any]) -> Model:
    """Make a `Model` from an NNX module that takes one example.

    Args:
        build: makes the module from an `nnx.Rngs`. All its state must be `nnx.Param`: anything else, such as batch
            statistics, would mix examples.
        prepare: turns one example into the module's input.

    Raises:
        ValueError: the module holds state other than `nnx.Param`.
    """
    graph, template = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    other_state = {
        type(leaf).__name__
        for leaf in jax.tree.leaves(template, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param)
    }
    if other_state:
        raise ValueError(
            f"the module holds {', '.join(sorted(other_state))}; DP-SGD needs nnx.Param alone "
            "(batch statistics mix examples)"
        )

    def init(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, example: dict[str, Array]) -> Array:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(prepare(example))

    # One compiled program initialises in half the time of many small ones.
    return Model(init=jax.jit(init), apply=apply)
