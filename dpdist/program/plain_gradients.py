"""The plain gradient sum of a batch, without clipping: for non-private training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dpdist.mechanism.clipping.graph import refuse_complex
from dpdist.mechanism.clipping.paths import trainable, with_frozen
from dpdist.program.flat_products import with_flat_products


def plain_grad_sum(
    loss_fn: Callable[[Any, Any], Any], *, frozen: Collection[str] = frozenset()
) -> Callable[[Any, Any, Any], tuple[Any, Float32[Array, " p"]]]:
    """Make `f(params, batch, mask) -> (sums, norms)` that clips nothing: no privacy, and norms all 0.

    It runs one backward pass over the masked sum of losses. Shapes are those of `clipped_grad_sum`.

    Raises:
        UnsupportedLossError: when `f` is called or traced: a parameter that trains is complex.
    """

    def grad_sum(params: Any, batch: Any, mask: Float[Array | np.ndarray, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        refuse_complex(params, frozen)
        # A padding row of zeros may have a NaN gradient even at weight 0 (0 * inf), so compute a real row in its place.
        used = mask > 0
        rows = jnp.where(used, jnp.arange(mask.shape[0]), jnp.argmax(used))
        real = jax.tree.map(lambda column: column[rows], batch)

        def total(training: Any) -> Array:
            losses = jax.vmap(loss_fn, in_axes=(None, 0))(with_frozen(training, params), real)
            return jnp.sum(jnp.where(used, losses, 0.0))

        gradient = with_flat_products(jax.grad(total))(trainable(params, frozen))
        sums = jax.tree.map(lambda g: jnp.where(used.any(), g, 0).astype(jnp.float32), gradient)
        return sums, jnp.zeros(mask.shape, jnp.float32)

    return grad_sum
