"""Look at a few training examples through the model: their losses and gradient norms, for the owner's eyes alone.

A model that cannot learn from the data, such as one whose every gradient is NaN, would otherwise train on noise
without a word, under a guarantee that holds. What is found depends on the data and goes under `private/`; only that
*nothing* is finite is told in the open, as the end of a run is.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from dpdist.data.sources import Source, read_rows
from dpdist.errors import InputError
from dpdist.mechanism.clipping.paths import trainable, with_frozen
from dpdist.program.gradients import ExampleLoss
from dpdist.program.self_test import Accumulate

#: Examples that are looked at.
SIZE = 16
#: Clipped examples that are summed alone, one after the other.
SUMMED = 4
#: Of the gradient norms.
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


class Probe:
    """Losses and gradient norms of up to 16 training examples, the same at every call; on one device, no collective.

    Args:
        loss: of one training example; a randomised one gets keys that are known to everyone.
        frozen: paths of the parameters that do not train.
        source: the training examples; `available` of them, from the first on, can be read here. They are read by the
            first call of `measure`.
    """

    def __init__(self, loss: ExampleLoss, frozen: Collection[str], source: Source, *, available: int) -> None:
        self._source, self._available, self._randomised = source, available, "key" in loss.example

        def one(params: Any, example: Any) -> tuple[Array, Array]:
            def of_trainable(training: Any) -> Array:
                return loss.loss_fn(with_frozen(training, params), example)

            value, gradient = jax.value_and_grad(of_trainable)(trainable(params, frozen))
            squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in jax.tree.leaves(gradient)]
            return value.astype(jnp.float32), jnp.sqrt(sum(squares, jnp.float32(0)))

        # One after the other: a gradient of each example at once may not fit beside what training holds.
        self._measure = jax.jit(lambda params, batch: jax.lax.map(lambda example: one(params, example), batch))

    def measure(self, params: Any) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Losses and gradient norms of the examples.

        Args:
            params: on one device of this process.
        """
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        losses, norms = self._measure(params, jax.device_put(self._batch, device))
        return np.asarray(losses), np.asarray(norms)

    def below_clip_norm(
        self, accumulate: Accumulate, params: Any, norms: Float32[np.ndarray, " n"], *, size: int, clip_norm: float
    ) -> float | None:
        """The share of C that clipped examples do not reach: what `clipping.tensor_cores` takes for rounding.

        Args:
            accumulate: the compiled sum of `size` examples.
            norms: what `measure` found.

        Returns:
            The median of up to `SUMMED` examples, or None where no gradient is longer than C, or where the loss is
            randomised: the gradient that `accumulate` sums is not the one that `norms` is of.
        """
        if self._randomised:
            return None
        clipped = np.flatnonzero(np.isfinite(norms) & (norms > 1.05 * clip_norm))[:SUMMED]  # not of rounding itself
        alone = (np.arange(size) == 0).astype(np.float32)
        sums = (
            accumulate(params, {k: np.repeat(x[i : i + 1], size, 0) for k, x in self._batch.items()}, alone)
            for i in clipped
        )
        shares = [1 - float(np.linalg.norm(total)) / clip_norm for total in sums]
        return float(np.median(shares)) if shares else None

    @cached_property
    def _batch(self) -> dict[str, Any]:
        count = min(SIZE, self._available)
        rows = read_rows(self._source, np.arange(count, dtype=np.int64) * (self._available // count))
        return rows | ({"key": jax.random.split(jax.random.key(0), count)} if self._randomised else {})


def described(losses: np.ndarray, norms: np.ndarray) -> dict[str, Any]:
    """What is kept, as JSON: `examples`, how many are `not_finite`, and of the others the mean `loss` and `norms`."""
    good = np.isfinite(losses) & np.isfinite(norms)
    found: dict[str, Any] = {"examples": len(losses), "not_finite": int((~good).sum())}
    if not good.any():
        return found | {"loss": None, "norms": None}
    spread = {name: float(np.quantile(norms[good], at)) for name, at in QUANTILES.items()}
    return found | {"loss": float(np.mean(losses[good], dtype=np.float64)), "norms": spread}


def require_something_to_learn(found: dict[str, Any]) -> None:
    """Check that at least one of the examples has a gradient; of fewer than 16, what they have says nothing.

    Raises:
        InputError: none has; it says so of all of them together.
    """
    if found["not_finite"] == found["examples"] >= SIZE:
        raise InputError(
            "model.loss",
            f"{found['examples']} training examples",
            "the loss or the gradient of every one that was tried is NaN or infinite, so the run would train on noise "
            "alone: check the scale of the inputs, ids outside a vocabulary, logarithms of 0, and "
            "model.options.dtype (`dpdist data describe` shows what the model sees).",
        )
