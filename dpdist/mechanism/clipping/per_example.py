"""The reference method: compute every example's gradient, clip it, add it up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from dpdist.mechanism.clipping.graph import refuse_complex
from dpdist.mechanism.clipping.paths import trainable, with_frozen
from dpdist.mechanism.clipping.separate import for_each
from dpdist.mechanism.clipping.weights import norms_of, norms_of_gradients, rounded_float32, weigh, weighted_sum


def per_example_grad_sum(
    loss_fn: Callable[[Any, Any], Any], *, clip_norm: float, frozen: Collection[str] = frozenset()
) -> Callable[[Any, Any, Any], tuple[Any, Float32[Array, " p"]]]:
    """Make the function that `clipped_grad_sum` describes; it needs 12 bytes of memory per parameter and example."""

    def clipped_sum(params: Any, batch: Any, mask: Float[Array | np.ndarray, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        def loss(training: Any, example: Any) -> Array:
            return loss_fn(with_frozen(training, params), example)

        refuse_complex(params, frozen)
        grads = for_each(partial(jax.grad(loss), trainable(params, frozen)), mask.shape[0], batch)
        grads = jax.tree.map(rounded_float32, grads)
        norms = norms_of_gradients(jax.tree.leaves(grads), mask.shape[0])
        scale, used = weigh(norms, mask, clip_norm)
        return jax.tree.map(lambda g: weighted_sum(scale, used, g), grads), norms_of(norms.computed)

    return clipped_sum
