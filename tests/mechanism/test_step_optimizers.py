"""What follows the noise: optimizers, learning-rate schedules and the parameter average. None costs privacy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.config import Optimizer
from dpdist.mechanism.step import flatten
from dpdist.program import optimizer
from dpdist.program.update import unflatten

SMALL = ((3, 4), (5,))


def trajectory(rig: Callable[..., Any], config: Optimizer, steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(mean gradient of every step, parameters after it) of a real run with that optimizer, without noise."""
    r = rig(1, private=False, optimizer=optimizer.build(config, steps), shapes=SMALL)
    state, sums = r.start()
    gradients, params = [], []
    for step in range(steps):
        sample = list(range(step, 60, 5))
        state, sums, _, _ = r.take(state, sums, sample, step)
        gradients.append(r.gradient_sum(sample, clipped=False) / r.expected_batch_size)
        params.append(r.flat(state.params).astype(np.float64))
    return gradients, params


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(rig: Callable[..., Any], momentum: float) -> None:
    gradients, params = trajectory(rig, Optimizer(learning_rate=0.3, momentum=momentum), 5)
    velocity, expected = np.zeros(17), np.zeros(17)
    for gradient, found in zip(gradients, params, strict=True):
        velocity = momentum * velocity + gradient
        expected = expected - 0.3 * velocity
        assert close(found, expected)


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adamw", 0.1)])
def test_adam(rig: Callable[..., Any], name: Any, decay: float) -> None:
    gradients, params = trajectory(
        rig, Optimizer(name=name, learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay), 5
    )
    m, v, expected = np.zeros(17), np.zeros(17), np.zeros(17)
    for t, (gradient, found) in enumerate(zip(gradients, params, strict=True), 1):
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        expected = expected - 0.1 * (direction + decay * expected)
        assert close(found, expected)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [2.0] * 8),
        ("constant", 4, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]),
        ("linear", 0, [2 * (1 - t / 8) for t in range(8)]),
        ("linear", 4, [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", 0, [1 + np.cos(np.pi * t / 8) for t in range(8)]),
        ("cosine", 4, [0.0, 0.5, 1.0, 1.5, *(1 + np.cos(np.pi * t / 4) for t in range(4))]),
        ("cosine", 100, [2 * t / 8 for t in range(8)]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, warmup: int, expected: list[float]) -> None:
    """Seen from outside: with a gradient of 1, SGD moves by the learning rate."""
    build = optimizer.build(Optimizer(learning_rate=2.0, schedule=schedule, warmup_steps=warmup), steps=8)
    state, rates = build.init(jnp.zeros(())), []
    for _ in range(8):
        update, state = build.update(jnp.ones(()), state, jnp.zeros(()))
        rates.append(-float(update))
    assert np.allclose(rates, expected, atol=1e-6)


def test_the_average_forgets_the_start_and_follows_the_parameters(rig: Callable[..., Any]) -> None:
    r = rig(2, private=False, average_decay=0.6, shapes=SMALL)
    state, sums = r.start()
    expected = np.zeros(17)
    for step in range(15):
        state, sums, _, _ = r.take(state, sums, list(range(step, 60, 5)), step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * r.flat(state.params).astype(np.float64)
        assert close(r.flat(state.average), expected)
    assert (1 + 14) / (10 + 14) > 0.6 > 1 / 10  # both sides of the warm-up were seen
    assert np.array_equal(r.flat(state.released), r.flat(state.average))


def test_without_an_average_the_parameters_are_released(rig: Callable[..., Any]) -> None:
    state, _ = rig(1).start()
    assert state.average is None
    assert state.released is state.params


def test_flat_vectors_keep_the_order_of_leaves() -> None:
    tree = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": [np.float32(7), np.arange(2, dtype=np.float16)]}
    vector = flatten(tree)
    assert vector.dtype == np.float32
    assert vector.tolist() == [7, 0, 1, 0, 1, 2, 3, 4, 5]
    back = unflatten(vector, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.shape == np.shape(y) and np.array_equal(x, y), back, tree))


def test_parameters_of_bfloat16_keep_their_type_with_an_optimizer_that_remembers(rig: Callable[..., Any]) -> None:
    r = rig(1, private=False, optimizer=optimizer.build(Optimizer(momentum=0.9), 3), shapes=SMALL, dtype=jnp.bfloat16)
    state, sums = r.start()
    for step in range(3):
        state, sums, _, _ = r.take(state, sums, [1, 2, 3], step)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(r.flat(state.params).astype(np.float64)).all()
