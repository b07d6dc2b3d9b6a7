"""The state that a run begins with, and what a noisy mean gradient makes of it: post-processing, at no cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32

from dpdist.mechanism.clipping.paths import trainable, with_frozen
from dpdist.mechanism.step import TrainState, Update


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, averaged: bool, frozen: Collection[str] = frozenset()
) -> TrainState:
    """The state before step 0, on the host; `frozen` names the paths of parameters that do not train."""
    moving = trainable(params, frozen)
    average = jax.tree.map(jnp.copy, moving) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(moving), average)


def placed(state: TrainState, replicated: NamedSharding) -> TrainState:
    """A host copy of the state, the same on every process, on every device of a mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated, np.asarray(x), np.shape(x)), state)


def update_of(
    optimizer: optax.GradientTransformation, *, average_decay: float, frozen: Collection[str] = frozenset()
) -> Update:
    """Return the update of a step: the optimizer's, and that of the average where `average_decay` is not 0."""

    def update(state: TrainState, mean: Float32[Array, " d"]) -> TrainState:
        before = trainable(state.params, frozen)
        updates, opt_state = optimizer.update(unflatten(mean, before), state.opt_state, before)
        after = optax.apply_updates(before, updates)
        # The gradient is float32 whatever the parameters are; what the optimizer keeps must not change type.
        opt_state = jax.tree.map(lambda new, old: new.astype(old.dtype), opt_state, state.opt_state)
        # The warm-up lets the average forget the initial parameters (De et al. 2022, section 3).
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = (
            jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.average, after)
            if average_decay
            else None
        )
        return TrainState(state.step + 1, with_frozen(after, state.params), opt_state, average)

    return update


def unflatten(vector: Float32[Array, " d"], like: Any) -> Any:
    """The inverse of `mechanism.step.flatten`, in float32 and with the structure and shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    edges = np.cumsum([0, *(leaf.size for leaf in leaves)])
    pieces = [vector[a:b].reshape(leaf.shape) for a, b, leaf in zip(edges[:-1], edges[1:], leaves, strict=True)]
    return jax.tree.unflatten(structure, pieces)
