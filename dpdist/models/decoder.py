"""What decoder language models share: causal attention, and the column of tokens that they read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def causal_attention(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Return softmax(q k^T / sqrt(d)) v, where a token sees itself and what is before it.

    Args:
        query: [length, heads, d].
        key: [length, groups, d]; each is shared by heads / groups consecutive heads (Ainslie et al. 2023).
        value: [length, groups, d].
        mask: bool[length], False for tokens that no other may see; None means that all may be seen.

    Returns:
        [length, heads * d], with the dtype of `value`; the softmax is in float32.
    """
    length, heads, width = query.shape
    query = query.reshape(length, key.shape[1], -1, width)
    scores = jnp.einsum("qghd,kgd->ghqk", query, key, preferred_element_type=jnp.float32) * width**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    # Finite rather than -inf, so that an example without any token (padding of a batch) gives no NaN.
    scores = jnp.where(seen if mask is None else seen & mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("ghqk,kgd->qghd", weights, value).reshape(length, heads * width)


def mask_of(example: dict[str, Array]) -> Array | None:
    """Return bool[length], False where a token is padding, or None if the data has no `attention_mask`."""
    return example["attention_mask"] != 0 if "attention_mask" in example else None


def check_tokens(example: dict[str, jax.ShapeDtypeStruct], model: str, positions: int) -> None:
    """Raise ValueError unless `example["input_ids"]` is int[length] of at most `positions` tokens."""
    column = example.get("input_ids")
    shape = None if column is None else column.shape
    if column is None or len(column.shape) != 1 or not 1 <= column.shape[0] <= positions:
        raise ValueError(
            f"{model} needs a column 'input_ids' of shape [length], at most {positions} tokens, not {shape}"
        )
    if not jnp.issubdtype(column.dtype, jnp.integer):
        raise ValueError(f"{model} needs integers in column 'input_ids', not {column.dtype}")
