"""Layers that the transformers share: embeddings, attention over one sequence, the MLP, and the layer norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

LECUN = nnx.initializers.lecun_normal()

#: Added to the variance in a layer norm, as in ViT and BERT.
EPSILON = 1e-12


def embed(table: Array, tokens: Array) -> Array:
    """Return the rows of `table` [vocabulary, width] for tokens int[length].

    A token outside the vocabulary gives a row of NaN, a negative one too, which `take` alone would count from the end;
    an example with NaN contributes nothing to a step.
    """
    tokens = tokens.astype(jnp.int32)  # a short one cannot hold the number of rows
    return jnp.take(table, jnp.where(tokens < 0, table.shape[0], tokens), axis=0)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, computed in float32 (Ba et al. 2016).

    `nnx.LayerNorm` multiplies the scale into the reciprocal root, so that its derivative needs that product for every
    number of x: more passes over memory, which a CPU feels.
    """

    def __init__(self, width: int, dtype: DTypeLike, rngs: nnx.Rngs, *, epsilon: float = EPSILON) -> None:
        # A key each, as Flax draws them, so that the layers which follow start from the same weights as with its norm.
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,)))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,)))
        self.dtype, self.epsilon = dtype, epsilon

    def __call__(self, x: Array) -> Array:
        """Normalise every row of x [..., width]; the result has `dtype`."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        deviation = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (centred * deviation * self.scale[...] + self.bias[...]).astype(self.dtype)


def gelu(x: Array) -> Array:
    """Return x Phi(x), the exact GELU (Hendrycks & Gimpel 2016), by `erf`: `jax.nn.gelu` uses the slower `erfc`."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(d)) v for each head of width d, and an output projection (Vaswani et al. 2017).

    Query, key and value are separate matrices, so that the weights of published models map one to one.

    Args:
        width: width of a token, in and out.
        heads: number of heads; must divide `width`.
        dtype: dtype of the matrix products; the softmax is in float32.
        init: initialiser of the four matrices.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(
        self, width: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs, *, init: nnx.Initializer = LECUN
    ) -> None:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")

        def square() -> nnx.Linear:
            return nnx.Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value, self.out = square(), square(), square(), square()
        self.heads = heads

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Attend over tokens [length, width]; `mask` bool[length] is False for tokens to ignore. Keeps the shape."""
        length, width = x.shape
        q, k, v = (p(x).reshape(length, self.heads, -1) for p in (self.query, self.key, self.value))
        scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=jnp.float32) * (width // self.heads) ** -0.5
        if mask is not None:
            # Finite rather than -inf, so that an example without any token (padding of a batch) gives no NaN.
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return self.out(jnp.einsum("hqk,khd->qhd", weights, v).reshape(length, width))


class Mlp(nnx.Module):
    """Two dense layers on each token, with the exact GELU and width `inner` in between."""

    def __init__(
        self, width: int, inner: int, dtype: DTypeLike, rngs: nnx.Rngs, *, init: nnx.Initializer = LECUN
    ) -> None:
        self.grow = nnx.Linear(width, inner, kernel_init=init, dtype=dtype, rngs=rngs)
        self.shrink = nnx.Linear(inner, width, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.shrink(gelu(self.grow(x)))
