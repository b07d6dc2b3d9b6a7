"""A rig: a compiled step of a small model whose gradients are known exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.sampling import Assignment, assign
from dpdist.mechanism.step import (
    Microbatch,
    StepPrograms,
    StepSpec,
    TrainState,
    accumulate_sample,
    noisy_update,
)
from dpdist.program.plain_gradients import plain_grad_sum
from dpdist.program.update import initial_state, placed, update_of


class Rig:
    """`StepPrograms` on the first n devices, a dataset of 64 examples, and their gradients in float64.

    The loss of example x is x[0] <A, a> + x[1] <B, b> with fixed directions A and B of norm 1, so its gradient is
    (x[0] A, x[1] B) whatever the parameters are, with norm |x|.
    """

    clip_norm = 0.5
    noise_multiplier = 2.0
    #: A power of two, so that a learning rate of 1 gives the noisy sum back without rounding.
    expected_batch_size = 4.0
    physical, tail = 4, 2
    grid = 2.0**-40
    examples = 64

    def __init__(
        self,
        devices: int,
        placement: Literal["designated", "fused"] = "designated",
        *,
        private: bool = True,
        optimizer: optax.GradientTransformation | None = None,
        average_decay: float = 0.0,
        shapes: Sequence[tuple[int, ...]] = ((100, 150), (5000,)),
        dtype: Any = jnp.float32,
    ) -> None:
        self.devices = devices
        self.mesh = Mesh(np.array(jax.devices("cpu")[:devices]), ("devices",))
        random = np.random.default_rng(1)
        directions = [random.normal(size=shape) for shape in shapes]
        self.directions = [(d / np.linalg.norm(d)).astype(np.float32) for d in directions]
        # Norms from 0.1 to 3: some examples are clipped, some are not.
        self.data = random.uniform(0.05, 2.1, (self.examples, 2)).astype(np.float32)
        a, b = self.directions

        def loss_fn(params: Any, example: dict[str, Any]) -> Any:
            return example["x"][0] * jnp.sum(params["a"] * a) + example["x"][1] * jnp.sum(params["b"] * b)

        self.optimizer = optimizer or optax.sgd(1.0)
        params = {"a": jnp.zeros(shapes[0], dtype), "b": jnp.zeros(shapes[1], dtype)}
        self.initial = initial_state(params, self.optimizer, averaged=average_decay > 0)
        self.step = StepPrograms(
            StepSpec(
                grad_sum=clipped_grad_sum(loss_fn, clip_norm=self.clip_norm) if private else plain_grad_sum(loss_fn),
                state=self.initial,
                example={"x": jax.ShapeDtypeStruct((2,), jnp.float32)},
                update=update_of(self.optimizer, average_decay=average_decay),
                mesh=self.mesh,
                batch_sizes=(self.physical, self.tail),
                normaliser=self.expected_batch_size,
                clip_norm=self.clip_norm if private else float("inf"),
                noise_scale=self.noise_multiplier * self.clip_norm if private else None,
                grid=self.grid if private else None,
                placement=placement,
                randomised=False,
            )
        )
        self.keys = Keys(Secret.from_insecure_seed(7), b"rig")

    def gradient_sum(self, sample: Iterable[int], *, clipped: bool = True) -> np.ndarray:
        """Compute the reference: clip and add one example after the other, in float64."""
        total = np.zeros(sum(d.size for d in self.directions))
        for i in sample:
            x = self.data[i].astype(np.float64)
            gradient = np.concatenate(
                [value * d.ravel().astype(np.float64) for value, d in zip(x, self.directions, strict=True)]
            )
            total += gradient * (min(1.0, self.clip_norm / np.linalg.norm(gradient)) if clipped else 1.0)
        return total

    def start(self) -> tuple[TrainState, Any]:
        """Return the state before step 0 and an empty accumulator."""
        return placed(self.initial, self.step.replicated), self.step.zero_sums()

    def assign(self, sample: Sequence[int], step: int, *, physical: int, assignment: str = "balanced") -> Assignment:
        """The assignment of a step with this sample, grouped in the order given."""
        return assign(
            step,
            np.asarray(sample, np.int64),
            assignment=assignment,
            dataset_size=self.examples,
            host_of_device=[0] * self.devices,
            physical=physical,
            tail=self.tail,
        )

    def rounds(self, assigned: Assignment, *, padding: float) -> Iterator[dict[int, Microbatch]]:
        """Yield the microbatches of an assignment, round by round; padding rows hold `padding`."""
        for number in range(assigned.rounds):
            yield {
                position: jax.device_put(self.microbatch(rows, padding), device)
                for position, device in self.step.local.items()
                if len(rows := assigned.rows(position, number))
            }

    def microbatch(self, rows: np.ndarray, padding: float) -> Microbatch:
        real = rows >= 0
        x = np.where(real[:, None], self.data[rows], np.float32(padding))
        return Microbatch({"x": x}, real.astype(np.float32), np.where(real, rows, 0).astype(np.int32))

    def accumulate(
        self,
        state: TrainState,
        sums: Any,
        sample: Sequence[int],
        step: int,
        *,
        padding: float,
        physical: int,
        assignment: str = "balanced",
    ) -> Any:
        """The first half of a step."""
        rounds = self.rounds(self.assign(sample, step, physical=physical, assignment=assignment), padding=padding)
        return accumulate_sample(self.step, state.params, sums, rounds, self.step.loss_key(self.keys, step))

    def take(
        self,
        state: TrainState,
        sums: Any,
        sample: Sequence[int],
        step: int,
        *,
        padding: float = np.nan,
        physical: int = physical,
        assignment: str = "balanced",
    ) -> tuple[TrainState, Any, np.ndarray, np.ndarray | None]:
        """Take one whole step by the two halves that every loop uses; returns (state, sums, diagnostics, draw)."""
        sums = self.accumulate(state, sums, sample, step, padding=padding, physical=physical, assignment=assignment)
        state, sums, diagnostics, draw = noisy_update(self.step, state, sums, self.keys, step)
        return state, sums, np.asarray(diagnostics), None if draw is None else np.asarray(draw)

    def noisy_sum(self, sample: Sequence[int], step: int, **how: Any) -> np.ndarray:
        """Return the noisy sum: -B times the update of one step from zero parameters at learning rate 1."""
        state, sums = self.start()
        state, *_ = self.take(state, sums, sample, step, **how)
        return -self.flat(state.params).astype(np.float64) * self.expected_batch_size

    @staticmethod
    def flat(tree: Any) -> np.ndarray:
        """Concatenate all leaves into one vector."""
        return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="session")
def rig() -> Callable[..., Rig]:
    """Return `rig(devices, placement)`, compiled once a session."""
    made = cache(Rig)

    def get(devices: int, placement: str = "designated", **how: Any) -> Rig:
        return made(devices, placement, **how)  # always positional, so that the cache hits

    return get
