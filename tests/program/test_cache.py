"""How many examples at a time: from shapes alone, so that all ranks agree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpdist.program.cache import examples_at_a_time, few_at_a_time

EXAMPLE = jax.ShapeDtypeStruct((100,), jnp.float32)
PARAMS = {"w": jax.ShapeDtypeStruct((100, 250), jnp.float32), "large": jax.ShapeDtypeStruct((10**6,), jnp.float32)}


def loss(params: Any, x: jax.Array) -> jax.Array:
    """Its largest value of an example is the hidden layer, 250 numbers; of parameters, a cast of a million."""
    table = params["large"].astype(jnp.bfloat16)
    return jnp.sum(jnp.tanh(x @ params["w"])) + table[0]


def test_what_an_example_needs_fits_into_the_cache() -> None:
    assert examples_at_a_time(loss, PARAMS, EXAMPLE, "cpu") == 2048  # of 1,000 bytes each


def test_one_that_does_not_fit_goes_alone() -> None:
    assert examples_at_a_time(lambda params, x: jnp.sum(jnp.tile(x, 10_000)), PARAMS, EXAMPLE, "cpu") == 1


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_calls_are_looked_into(wrap: Any) -> None:
    assert examples_at_a_time(wrap(loss), PARAMS, EXAMPLE, "cpu") == 2048


def test_loops_are_looked_into() -> None:
    def looped(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda a, _: (jnp.tanh(a @ params["w"]).sum() + a, None), x, None, length=3)[0].sum()

    assert examples_at_a_time(looped, PARAMS, EXAMPLE, "cpu") == 2048


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_devices_take_the_whole_batch(platform: str) -> None:
    assert examples_at_a_time(loss, PARAMS, EXAMPLE, platform) is None


def test_convolutions_take_the_whole_batch() -> None:
    def convolving(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.convolve(x, params["w"][0]))

    assert examples_at_a_time(jax.jit(convolving), PARAMS, EXAMPLE, "cpu") is None


def test_a_key_is_data_too() -> None:
    def noisy(params: Any, key: jax.Array) -> jax.Array:
        return jnp.sum(jax.random.normal(jax.random.split(key)[0], (250,)) * params["w"])

    key = jax.eval_shape(lambda: jax.random.key(0))
    assert examples_at_a_time(noisy, PARAMS, key, "cpu") == 16  # 100,000 bytes


@pytest.mark.parametrize(
    ("examples", "sizes", "expected"),
    [
        (4, (32, 16), 4),
        (4, (6, 3), 3),  # the largest that divides both
        (8, (10, 5), 5),
        (4, (7, 3), None),  # one at a time would be slower than all at once
        (8, (8, 4), 4),
        (8, (8,), None),  # it is the whole batch
        (16, (8, 4), None),
        (None, (32, 16), None),
    ],
)
def test_the_batches_are_divided_evenly_or_not_at_all(
    examples: int | None, sizes: tuple[int, ...], expected: int | None
) -> None:
    seen = []

    def grad_sum(params: Any, batch: Any, mask: jax.Array) -> tuple[Any, jax.Array]:
        seen.append(mask.shape[0])
        return jnp.sum(mask), mask

    for size in sizes:
        few_at_a_time(grad_sum, examples, sizes)({}, {}, jnp.ones(size))
    assert set(seen) == (set(sizes) if expected is None else {expected})
