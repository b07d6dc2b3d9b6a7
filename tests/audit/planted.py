"""Ten bugs that published or home-made DP-SGD has had, each put in the place of the exact part of the product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.mechanism import step as step_module
from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.noise import block_size, integer_noise
from dpdist.mechanism.sampling import Assignment, microbatch_sizes, words
from dpdist.mechanism.step import StepPrograms
from dpdist.program import assignments, gradients
from dpdist.program.plain_gradients import plain_grad_sum

Plant = Callable[[pytest.MonkeyPatch], None]


def noise_scaled_wrongly(patch: pytest.MonkeyPatch) -> None:
    """Half of the noise, as where a variance is taken for a standard deviation."""
    patch.setattr(
        step_module, "integer_noise", lambda keys, coordinates, units: integer_noise(keys, coordinates, units / 2)
    )


def noise_per_device(patch: pytest.MonkeyPatch) -> None:
    """Every device adds a draw of its own to its part, and all are averaged: the noise shrinks by sqrt(devices)."""

    def draw(self: StepPrograms, keys: Keys, step: int) -> tuple[Any, Any]:
        slices = []
        for position, device in self.local.items():
            key = jax.device_put(keys.noise(step + position * 2**32, self.blocks), self.designated)
            own = np.asarray(self._draw(key)) // self.devices
            with jax.enable_x64(True):
                slices.append(jax.device_put(own, device))
        return jax.make_array_from_single_device_arrays(self._noise_shape, self.sharded, slices), slices[0]

    patch.setattr(StepPrograms, "draw", draw)


def one_key_for_two_leaves(patch: pytest.MonkeyPatch) -> None:
    """All blocks of coordinates draw from the first one's keys."""
    honest = Keys.noise
    patch.setattr(Keys, "noise", lambda self, step, blocks: np.repeat(honest(self, step, 1), blocks, axis=0))


def realised_batch_normaliser(patch: pytest.MonkeyPatch) -> None:
    """The noisy sum is divided by the number of examples that were sampled, not by B."""
    honest = StepPrograms._update_on_device

    def update(self: StepPrograms, state: Any, total: Any) -> Any:
        examples = total[self.parameters].astype(jnp.float64) * (self._spec.grid / self._unit[0])
        other = copy.copy(self)
        other._spec = SimpleNamespace(**vars(self._spec) | {"normaliser": jnp.maximum(examples, 1.0)})
        return honest(other, state, total)

    patch.setattr(StepPrograms, "_update_on_device", update)


def shuffling_instead_of_poisson(patch: pytest.MonkeyPatch) -> None:
    """The step takes the first B = 4 records of a shuffled epoch, whatever N is."""

    def first_batch(key: np.ndarray, sampling_probability: float, start: int, stop: int) -> np.ndarray:
        return np.sort(np.argsort(words(key, start, stop))[:4]).astype(np.int64)

    patch.setattr(assignments, "poisson_sample", first_batch)


def clipping_after_averaging(patch: pytest.MonkeyPatch) -> None:
    """The mean gradient of a microbatch is clipped, not each example's. The self-test of a run would refuse that."""

    def grad_sum_of(loss_fn: Any, *, clip_norm: float, frozen: Any, **_: Any) -> Any:
        plain = plain_grad_sum(loss_fn, frozen=frozen)

        def grad_sum(params: Any, batch: Any, mask: Any) -> Any:
            sums, norms = plain(params, batch, mask)
            count = jnp.maximum(jnp.sum(mask), 1.0)
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf / count)) for leaf in jax.tree.leaves(sums)))
            factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
            return jax.tree.map(lambda leaf: leaf * factor, sums), norms

        return grad_sum

    patch.setattr(gradients, "clipped_grad_sum", grad_sum_of)


def padding_with_real_examples(patch: pytest.MonkeyPatch) -> None:
    """The last microbatch is filled up with copies of its last example."""

    def rows(self: Assignment, device: int, number: int) -> np.ndarray:
        own = np.sort(self.by_device[device][number * self.physical : (number + 1) * self.physical])
        size = sum(microbatch_sizes(len(own), self.physical, self.tail))
        return np.pad(own, (0, size - len(own)), mode="edge") if len(own) else own

    patch.setattr(Assignment, "rows", rows)


def noise_reused_on_resume(patch: pytest.MonkeyPatch) -> None:
    """Keys depend on the secret and the step alone, not on the incarnation."""

    def derive(self: Keys, purpose: str, step: int, *, block: int = 0, size: int = 16) -> bytes:
        return self.secret.derive(purpose, step=step, block=block, size=size)

    patch.setattr(Keys, "_derive", derive)


def float32_scaling_of_the_draw(patch: pytest.MonkeyPatch) -> None:
    """One float32 normal times its scale, which cannot reach most points of the grid."""

    def draw(keys: Any, coordinates: int, units: float) -> Any:
        size = block_size(coordinates)

        def block(key: Any) -> Any:
            z = jax.random.normal(jax.random.wrap_key_data(key[0], impl="threefry2x32"), (size,), jnp.float32)
            return jnp.round((z * jnp.float32(units)).astype(jnp.float64)).astype(jnp.int64)

        return jax.lax.map(block, jnp.asarray(keys)).reshape(-1)[:coordinates]

    patch.setattr(step_module, "integer_noise", draw)


def layer_that_mixes_examples(patch: pytest.MonkeyPatch) -> None:
    """Inputs are centred over the microbatch before each example's loss, as batch normalisation would."""

    def grad_sum_of(loss_fn: Any, **options: Any) -> Any:
        honest = clipped_grad_sum(loss_fn, **options)

        def grad_sum(params: Any, batch: Any, mask: Any) -> Any:
            mean = jnp.sum(batch["value"] * mask) / jnp.maximum(jnp.sum(mask), 1.0)
            return honest(params, batch | {"value": batch["value"] - mean}, mask)

        return grad_sum

    patch.setattr(gradients, "clipped_grad_sum", grad_sum_of)
