"""A batch that goes through in parts gives the sum and the norms of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.mechanism.clipping import METHODS, clipped_grad_sum, in_parts

SIZE, WIDTH, CLIP = 6, 5, 0.5


def loss(params: Any, example: Any) -> jax.Array:
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return jnp.sum(jnp.square(hidden)) / example["scale"]


def problem() -> tuple[Any, Any, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, WIDTH)).astype(np.float32), "b": np.ones(WIDTH, np.float32)}
    batch = {"x": rng.normal(size=(SIZE, 4, 3)).astype(np.float32), "scale": np.ones(SIZE, np.float32)}
    return params, batch, np.array([1, 0, 1, 1, 1, 1], np.float32)


@pytest.mark.parametrize("examples", [1, 2, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up_to_the_whole(method: str, examples: int | None) -> None:
    params, batch, mask = problem()
    whole = clipped_grad_sum(loss, clip_norm=CLIP, method=method)
    expected, expected_norms = whole(params, batch, mask)
    sums, norms = jax.jit(in_parts(whole, examples))(params, batch, mask)
    assert norms.shape == (SIZE,)
    assert np.allclose(norms, expected_norms, rtol=1e-6)
    for name in params:
        assert np.allclose(sums[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_no_example_counts_twice(examples: int) -> None:
    """Every example's gradient is far over C, so one that were added twice would show."""
    params, batch, _ = problem()
    whole = clipped_grad_sum(loss, clip_norm=CLIP)
    for one in range(SIZE):
        alone = np.zeros(SIZE, np.float32)
        alone[one] = 1
        sums, _ = in_parts(whole, examples)(params, batch, alone)
        length = np.sqrt(sum(float(np.sum(np.square(each, dtype=np.float64))) for each in sums.values()))
        assert 0.99 * CLIP < length <= CLIP


@pytest.mark.parametrize("bad", [0, 3, SIZE - 1])
def test_an_example_without_a_finite_gradient_takes_nothing_with_it(bad: int) -> None:
    params, batch, mask = problem()
    mask[:] = 1
    without = mask.copy()
    without[bad] = 0
    expected, _ = in_parts(clipped_grad_sum(loss, clip_norm=CLIP), 2)(params, batch, without)
    batch["scale"][bad] = 0
    sums, norms = in_parts(clipped_grad_sum(loss, clip_norm=CLIP), 2)(params, batch, mask)
    assert not np.isfinite(norms[bad])
    for name in params:
        assert np.array_equal(sums[name], expected[name])


def test_keys_and_parameters_that_do_not_train_go_through() -> None:
    def noisy(params: Any, example: Any) -> jax.Array:
        return jnp.sum(params["w"] * jax.random.normal(example["key"], (WIDTH,))) + jnp.sum(params["frozen"])

    params = {"w": np.ones(WIDTH, np.float32), "frozen": np.ones(2, np.float32)}
    batch = {"key": jax.random.split(jax.random.key(0), SIZE)}
    whole = clipped_grad_sum(noisy, clip_norm=CLIP, frozen={"frozen"})
    expected, norms = whole(params, batch, np.ones(SIZE, np.float32))
    sums, found = in_parts(whole, 3)(params, batch, np.ones(SIZE, np.float32))
    assert sums["frozen"] is None
    assert np.allclose(sums["w"], expected["w"], atol=1e-6)
    assert np.allclose(found, norms)


def test_one_program_for_all_parts() -> None:
    traced = 0

    def counting(grad_sum: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal traced
            traced += 1
            return grad_sum(*args)

        return counted

    params, batch, mask = problem()
    in_parts(counting(clipped_grad_sum(loss, clip_norm=CLIP)), 2)(params, batch, mask)
    assert traced <= 2  # once for the shapes and once for the loop's body, whatever the number of parts
