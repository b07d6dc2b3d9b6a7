"""Flax NNX modules as models of one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.errors import InputError
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


@dataclass(frozen=True, kw_only=True)
class NnxModel(Model):
    """A `Model` that knows the module it was made of, so that its layers can be adapted."""

    module: Callable[[nnx.Rngs], nnx.Module]
    prepare: Callable[[dict[str, Array]], Any]


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], prepare: Callable[[dict[str, Array]], Any]) -> NnxModel:
    """Make a `Model` from an NNX module that takes one example.

    A module with random streams, as `nnx.Dropout` has them, becomes a randomised model: in training (`module.train()`)
    the streams begin at the example's own key, and in evaluation (`module.eval()`) there is none.

    Args:
        build: makes the module from an `nnx.Rngs`. Beside random streams, all its state must be `nnx.Param`: batch
            statistics mix examples, and other state would stay as it is.
        prepare: turns one example into the module's input.

    Raises:
        InputError: the module holds other state.
    """
    graph, *states = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, nnx.RngState, ...)
    template, streams, other = states
    other_state = {
        type(leaf).__name__
        for leaf in jax.tree.leaves(other, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if isinstance(leaf, nnx.Variable)
    }
    if "BatchStat" in other_state:
        raise InputError(
            "model.name",
            "BatchStat",
            "the module holds batch statistics, which mix examples, and DP-SGD must keep them apart; take a group or "
            "layer norm.",
        )
    if other_state:
        raise InputError(
            "model.name",
            ", ".join(sorted(other_state)),
            "the module holds state that would change in training; DP-SGD takes nnx.Param, and random streams such as "
            "those of nnx.Dropout, alone.",
        )
    leaves, structure = jax.tree.flatten(streams)

    def begun(key: Array) -> Any:
        """The random streams, each from a key of its own and at its beginning."""
        keys = [
            jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, keys)

    def init(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, example: dict[str, Array]) -> Array:
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        if not leaves:
            return nnx.merge(graph, state)(prepare(example))
        training = "key" in example
        module = nnx.merge(graph, state, begun(example["key"] if training else jax.random.key(0)))
        module.train() if training else module.eval()
        return module(prepare(example))

    return NnxModel(init=_run_once(init), apply=apply, randomised=bool(leaves), module=build, prepare=prepare)


def _run_once(init: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Compile `init` as one program, with few optimisations for a CPU, where compiling takes longer than running.

    Within another program, which has options of its own, it is a part of that one.
    """
    quick = {"xla_backend_optimization_level": 1}

    def initialise(key: Array) -> Any:
        if isinstance(key, jax.core.Tracer):
            return init(key)
        chosen = getattr(jax.config, "jax_default_device", None)  # or the name of a platform
        platform = jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)
        return jax.jit(init, compiler_options=quick if platform == "cpu" else None)(key)

    return initialise
