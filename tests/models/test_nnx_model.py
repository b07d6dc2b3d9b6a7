"""NNX modules as models: random streams of dropout begin at the example's key, and other state is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.models.nnx_model import from_nnx


class Dropping(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(4, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)
        self.early, self.late = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.late(self.early(self.first(x))))


class Counting(nnx.Module):
    def __init__(self, kind: Any) -> None:
        self.weight, self.count = nnx.Param(jnp.ones(3)), kind(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.weight[...]


class Masks(nnx.Module):
    """The masks of two dropouts, for an input of ones."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jnp.ones(()))
        self.early, self.late = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.stack([self.early(x), self.late(x)]) * self.weight[...]


def test_dropout_drops_in_training_by_the_examples_key_and_never_in_evaluation() -> None:
    model = from_nnx(Masks, lambda example: example["x"])
    assert model.randomised
    params = model.init(jax.random.key(0))
    assert set(params) == {"weight"}
    apply, x = jax.jit(model.apply), jnp.ones(2000)
    first, again, other = (np.asarray(apply(params, {"x": x, "key": jax.random.key(i)})) for i in (1, 1, 2))
    assert set(np.unique(first)) == {0.0, 2.0}
    assert np.array_equal(first, again)
    assert abs((first == other).mean() - 0.5) < 0.05  # keys are independent,
    assert abs((first[0] == first[1]).mean() - 0.5) < 0.05  # and so are the layers
    assert np.array_equal(apply(params, {"x": x}), np.ones((2, 2000)))


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "auto"])
def test_clipped_sums_with_dropout_are_those_of_vmap(method: str) -> None:
    model = from_nnx(Dropping, lambda example: example["x"])
    params = model.init(jax.random.key(0))
    batch = {"x": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)}
    batch |= {"key": jax.random.split(jax.random.key(7), 4)}

    def sums(method: str) -> list[np.ndarray]:
        grad_sum = clipped_grad_sum(
            lambda params, example: model.apply(params, example)[0] ** 2, clip_norm=0.5, method=method
        )
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(grad_sum)(params, batch, np.ones(4))[0])]

    for found, expected in zip(sums(method), sums("per_example"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (nnx.BatchStat, "holds batch statistics, which mix examples"),
        (
            nnx.Cache,
            "'Cache': the module holds state that would change in training; DP-SGD takes nnx.Param, and random streams",
        ),
    ],
)
def test_other_state_is_refused_for_its_own_reason(kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_nnx(lambda rngs: Counting(kind), lambda example: example["x"])
