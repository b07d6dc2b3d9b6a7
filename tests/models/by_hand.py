"""Clipped sums by a plain `vmap` of `grad`, which those of every method have to equal."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dpdist import models
from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.clipping.paths import trainable

#: Compiling takes longer than running.
QUICK = {"xla_backend_optimization_level": 0}
#: Of four examples; one is padding.
MASK = np.array([1, 1, 0, 1], np.float32)


def by_hand(loss_fn: Any, params: Any, batch: Any, frozen: frozenset[str]) -> tuple[float, list[np.ndarray]]:
    """A norm that clips about half of the examples, and the clipped sums of `vmap(grad)`."""
    per_example = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)), compiler_options=QUICK)
    gradients = trainable(per_example(params, batch), frozen)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
    norms = np.sqrt(sum(np.square(leaf).reshape(4, -1).sum(1) for leaf in leaves))
    clip_norm = float(np.median(norms[MASK > 0]))
    weights = MASK * np.minimum(1, clip_norm / np.maximum(norms, 1e-30))
    return clip_norm, [np.tensordot(weights, leaf, 1) for leaf in leaves]


def length(sums: Any) -> float:
    """The L2 norm over all leaves together."""
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(sums))))


def assert_exact(model: models.Model, params: Any, frozen: frozenset[str], batch: Any, method: str) -> None:
    """The clipped sums are those of `vmap(grad)`, and no example on its own adds more than C."""
    loss_fn = models.example_loss(model)
    clip_norm, expected = by_hand(loss_fn, params, batch, frozen)
    grad_sum = jax.jit(
        clipped_grad_sum(loss_fn, clip_norm=clip_norm, method=method, frozen=frozen), compiler_options=QUICK
    )
    sums, norms = grad_sum(params, batch, MASK)
    found = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(sums)]
    assert len(found) == len(expected)
    assert length([a - b for a, b in zip(found, expected, strict=True)]) <= 3e-5 * length(expected)
    assert np.sum(norms[MASK > 0] > clip_norm * 1.001) == 1
    for one in np.eye(4, dtype=np.float32)[MASK > 0]:
        assert length(grad_sum(params, batch, one)[0]) <= clip_norm
