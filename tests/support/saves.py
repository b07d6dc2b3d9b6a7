"""A state and a JSON part to save, and checkpoints to save them in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpdist.mechanism.step import TrainState
from dpdist.run.checkpoint import Checkpoints

META = {"config": {"learning_rate": 0.5, "name": "Alice"}, "pair": (1, 2), "nothing": float("nan")}


def state(seed: int = 0, size: int = 50) -> TrainState:
    """Containers and dtypes of all kinds, with nothing in some."""
    draw = np.random.default_rng(seed)
    weights = {"w": jnp.asarray(draw.standard_normal((size, 30)), jnp.float32), "half": jnp.ones(5, jnp.bfloat16)}
    params = {"layers": [weights, (jnp.int8(3), None)]}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return TrainState(jnp.asarray(seed, jnp.int32), params, optimizer.init(params), None)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def noticed(checkpoints: Checkpoints) -> bool:
    """Whether `verify` sees what was done to step 1; where it does not, what is restored must be what was saved."""
    reason = checkpoints.verify(1)
    if reason is None:
        assert_same(checkpoints.restore(1, state()), state())
        assert checkpoints.read_meta(1)["config"] == META["config"]
    else:
        assert "Alice" not in reason
    return reason is not None
