"""Our own layers compute what those of JAX and Flax compute, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpdist.models.pooling import max_pool
from dpdist.models.transformer import EPSILON, LayerNorm, gelu


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (2, 2), (3, 2), (3, 1), (4, 3)])
def test_max_pooling_and_its_gradient_are_those_of_flax_with_ties_too(window: int, stride: int) -> None:
    image = jnp.asarray(np.random.default_rng(0).integers(0, 3, (11, 9, 2)).astype(np.float32))  # full of equal pixels

    def theirs(x: jax.Array) -> jax.Array:
        return nnx.max_pool(x, (window, window), strides=(stride, stride))

    expected, back = jax.vjp(theirs, image)
    found, our_back = jax.vjp(lambda x: max_pool(x, window, stride), image)
    assert np.array_equal(found, expected)
    weights = 1 + jnp.arange(expected.size, dtype=jnp.float32).reshape(expected.shape)  # small integers: sums are exact
    assert np.array_equal(our_back(weights)[0], back(weights)[0])


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_nan_goes_through_max_pooling(place: tuple[int, int]) -> None:
    image = jnp.ones((2, 2, 1)).at[place].set(jnp.nan)
    assert np.isnan(max_pool(image, 2, 1)).all()


def test_gelu_is_the_exact_one() -> None:
    x = jnp.linspace(-12, 12, 4001)
    expected, slope = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    found, our_slope = jax.vmap(jax.value_and_grad(gelu))(x)
    assert np.abs(found - expected).max() < 2e-6
    assert np.abs(our_slope - slope).max() < 2e-6


def test_the_layer_norm_is_that_of_flax() -> None:
    rngs = nnx.Rngs(0)
    ours = LayerNorm(24, jnp.float32, rngs)
    theirs = nnx.LayerNorm(24, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
    scale, bias, x = 1 + jax.random.normal(rngs.params(), (3, 24))
    for layer in (ours, theirs):
        layer.scale[...], layer.bias[...] = scale, bias
    x = 100 + jnp.stack([x, 3 * x + 1])
    assert np.allclose(ours(x), theirs(x), atol=1e-4)


def test_the_layer_norm_rounds_only_its_result_to_a_short_format() -> None:
    layer, x = LayerNorm(24, jnp.bfloat16, nnx.Rngs(0)), 100 + jax.random.normal(jax.random.key(0), (2, 24))
    exact = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    assert layer(x).dtype == jnp.bfloat16
    assert np.allclose(layer(x).astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-4)
