"""One DP-SGD step: clip and sum (`accumulate_sample`), then add noise and update (`noisy_update`).

Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1, with Poisson subsampling: the update uses

    (sum_{i in sample} clip_C(g_i) + N(0, sigma^2 C^2 I)) / B,     B = q N constant.

`StepPrograms` compiles every shape that can occur before the first step and calls compiled programs, which
reject any other shape instead of compiling again. `accumulate` holds no collective; `apply` all-reduces one
vector of parameter size for the sums, and one more where the noise is shared as `designated`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float32

from dpdist.mechanism.clipping import GradSum, trainable, with_frozen
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.noise import gaussian_draw

#: What the all-reduce carries behind the gradient sum: counts and norms that go to private/ only.
DIAGNOSTICS = ("examples", "clipped", "not_finite", "norm_sum")


class TrainState(NamedTuple):
    """What a step updates, replicated on every device; all of it is in a checkpoint."""

    step: Array
    params: Any
    opt_state: Any
    #: Exponential average of the params that train, or None. Post-processing: it costs no privacy.
    average: Any

    @property
    def released(self) -> Any:
        """The parameters to evaluate and to give away: the average where one is kept."""
        return self.params if self.average is None else with_frozen(self.average, self.params)


class Microbatch(NamedTuple):
    """`devices * p` examples: a pytree of arrays, a mask (0 is padding) and the example indices."""

    data: Any
    mask: Any
    index: Any


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, averaged: bool, frozen: Collection[str] = frozenset()
) -> TrainState:
    """The state before step 0, on the host; `frozen` names the paths of parameters that do not train."""
    moving = trainable(params, frozen)
    average = jax.tree.map(jnp.copy, moving) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(moving), average)


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What a step computes, on which mesh: all that its programs are compiled from."""

    #: `f(params, batch, mask) -> (sums, norms)`, clipped, or plain for the non-private arm; with the same `frozen`.
    grad_sum: GradSum
    #: Shapes (or arrays) of the state.
    state: TrainState
    #: One example as a pytree of shapes and dtypes, without the leading axis.
    example: dict[str, jax.ShapeDtypeStruct]
    #: A transformation of the mean gradient.
    optimizer: optax.GradientTransformation
    #: One axis; its first device is the designated one.
    mesh: Mesh
    #: The physical batch sizes (examples a device) that microbatches may have.
    batch_sizes: Collection[int]
    #: B, the constant that sums are divided by.
    normaliser: float
    #: C, for the count of clipped examples; infinite when nothing is clipped.
    clip_norm: float
    #: sigma * C, or None for no noise.
    noise_scale: float | None
    placement: Literal["designated", "fused"]
    #: Decay of the parameter average; 0 keeps none.
    average_decay: float
    #: True gives each example a `key` of its own, derived from the step's loss key and its index.
    randomised: bool
    #: Paths of parameters that do not train: they get no sum, no noise and no update.
    frozen: Collection[str] = frozenset()


class StepPrograms:
    """The programs of a run, compiled for one mesh before the first step."""

    def __init__(self, spec: StepSpec) -> None:
        mesh = spec.mesh
        axis = mesh.axis_names[0]
        self._spec, self._axis = spec, axis
        self.devices = mesh.devices.size
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(axis))
        self.designated = mesh.devices.flat[0]
        moving = trainable(spec.state.params, spec.frozen)
        self.sizes: list[int] = [math.prod(leaf.shape) for leaf in jax.tree.leaves(moving)]
        self.parameters = sum(self.sizes)

        # check_vma=False: with it on, the gradient of a replicated parameter gets an all-reduce of its own.
        accumulate = jax.shard_map(
            self._accumulate_on_device,
            mesh=mesh,
            check_vma=False,
            out_specs=PartitionSpec(axis),
            in_specs=(PartitionSpec(), PartitionSpec(axis), PartitionSpec(axis), PartitionSpec()),
        )
        apply = jax.shard_map(
            self._apply_on_device,
            mesh=mesh,
            check_vma=False,
            out_specs=(PartitionSpec(), PartitionSpec(axis), PartitionSpec()),
            in_specs=(PartitionSpec(), PartitionSpec(axis), PartitionSpec(axis)),
        )
        abstract_state = self._abstract(spec.state, self.replicated)
        abstract_acc = self._shape((self.devices * (self.parameters + len(DIAGNOSTICS)),), jnp.float32, self.sharded)
        abstract_key = self._shape((2,), jnp.uint32, self.replicated)
        self._accumulate = {
            size: jax.jit(accumulate, donate_argnums=1)
            .lower(abstract_state.params, abstract_acc, self._abstract_microbatch(size), abstract_key)
            .compile()
            for size in sorted(set(spec.batch_sizes))
        }
        self._zeros = jax.jit(lambda: jnp.zeros(abstract_acc.shape, jnp.float32), out_shardings=self.sharded)
        self._draw, self._noise_shape, noise = None, None, None
        if spec.noise_scale is not None:
            self._noise_shape = (self.devices * self.parameters,)
            noise = self._shape(self._noise_shape, jnp.float32, self.sharded)
            leaf_keys = self._shape((len(self.sizes), 4, 2), jnp.uint32, SingleDeviceSharding(self.designated))
            if self.draws:
                draw = partial(gaussian_draw, sizes=self.sizes, scale=spec.noise_scale)
                self._draw = jax.jit(draw).lower(leaf_keys).compile()
            self._silence = [
                jax.device_put(np.zeros(self.parameters, np.float32), device)
                for device in mesh.local_devices
                if device != self.designated
            ]
        self._apply = jax.jit(apply, donate_argnums=(0, 1)).lower(abstract_state, abstract_acc, noise).compile()

    def _accumulate_on_device(
        self, params: Any, acc: Float32[Array, " w"], batch: Microbatch, key: Array
    ) -> Float32[Array, " w"]:
        """One device's part of `accumulate`: its own slice of the accumulator and of the microbatch."""
        data = batch.data
        if self._spec.randomised:
            root = jax.random.wrap_key_data(key, impl="threefry2x32")
            data = data | {"key": jax.vmap(partial(jax.random.fold_in, root))(batch.index)}
        sums, norms = self._spec.grad_sum(params, data, batch.mask)
        used = batch.mask > 0
        finite = used & jnp.isfinite(norms)
        diagnostics = jnp.stack(
            [
                jnp.sum(used),
                jnp.sum(finite & (norms > self._spec.clip_norm)),
                jnp.sum(used & ~finite),
                jnp.sum(jnp.where(finite, norms, 0.0)),
            ]
        )
        return acc + jnp.concatenate([flatten(sums), diagnostics.astype(jnp.float32)])

    def _apply_on_device(
        self, state: TrainState, acc: Float32[Array, " w"], noise: Float32[Array, " d"] | None
    ) -> tuple[TrainState, Array, Array]:
        """One device's part of `apply`: all-reduce with the noise, divide by B, update."""
        spec = self._spec
        if noise is not None and spec.placement == "fused":
            acc = acc.at[: self.parameters].add(noise)
        total = lax.psum(acc, self._axis)
        summed, diagnostics = total[: self.parameters], total[self.parameters :]
        if noise is not None and spec.placement == "designated":
            # The barrier keeps XLA from adding before it reduces, which is `fused`. It may still carry both
            # vectors in one operation.
            summed, noise = lax.optimization_barrier((summed, noise))
            summed = summed + lax.psum(noise, self._axis)  # every device but the designated holds zeros
        before = trainable(state.params, spec.frozen)
        mean = unflatten(summed / jnp.float32(spec.normaliser), before)
        updates, opt_state = spec.optimizer.update(mean, state.opt_state, before)
        after = optax.apply_updates(before, updates)
        # The gradient is float32 whatever the parameters are; what the optimizer keeps must not change type.
        opt_state = jax.tree.map(lambda new, old: new.astype(old.dtype), opt_state, state.opt_state)
        # The warm-up lets the average forget the initial parameters (De et al. 2022, section 3).
        decay = jnp.minimum(spec.average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = (
            jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.average, after)
            if spec.average_decay
            else None
        )
        params = with_frozen(after, state.params)
        return TrainState(state.step + 1, params, opt_state, average), jnp.zeros_like(acc), diagnostics

    def _abstract_microbatch(self, size: int) -> Microbatch:
        rows = self.devices * size
        data = {name: self._shape((rows, *x.shape), x.dtype, self.sharded) for name, x in self._spec.example.items()}
        mask, index = (self._shape((rows,), dtype, self.sharded) for dtype in (jnp.float32, jnp.int32))
        return Microbatch(data, mask, index)

    @property
    def draws(self) -> bool:
        """True on the one process that owns the designated device."""
        return self.designated.process_index == jax.process_index()

    def zero_sums(self) -> Array:
        """The accumulator before a step: float32[devices * (d + diagnostics)], one slice a device."""
        return self._zeros()

    def loss_key(self, keys: Keys, step: int) -> Array:
        """The step's key for randomised losses, on every device."""
        # Not device_put: on several processes it compares the value over all of them, a blocking collective.
        key = keys.loss(step)
        return jax.make_array_from_process_local_data(self.replicated, key, key.shape)

    def accumulate(self, params: Any, acc: Array, batch: Microbatch, loss_key: Array) -> Array:
        """Add the (clipped) gradient sum of one microbatch to each device's own slice; `acc` is consumed."""
        size = batch.mask.shape[0] // self.devices
        return self._accumulate[size](params, acc, batch, loss_key)

    def draw(self, keys: Keys, step: int) -> tuple[Array | None, Array | None]:
        """The noise of a step as an array with one slice a device, and the draw itself where it was made.

        Only the designated device draws; all other slices are zero. Both are None in a plain run.
        """
        if self._noise_shape is None:
            return None, None
        own = []
        if self._draw is not None:
            own = [self._draw(jax.device_put(keys.noise(step, len(self.sizes)), self.designated))]
        noise = jax.make_array_from_single_device_arrays(self._noise_shape, self.sharded, own + self._silence)
        return noise, own[0] if own else None

    def apply(self, state: TrainState, acc: Array, noise: Array | None) -> tuple[TrainState, Array, Array]:
        """All-reduce, add the noise, update. Consumes state and acc; returns (state, zeroed acc, diagnostics)."""
        return self._apply(state, acc, noise)

    def place(self, state: TrainState) -> TrainState:
        """A host copy of the state, the same on every process, replicated onto the mesh."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.replicated, np.asarray(x), np.shape(x)), state
        )

    def program_texts(self) -> dict[str, str]:
        """The compiled HLO by program name, for tests that count collectives."""
        accumulates = {f"accumulate_{size}": str(program.as_text()) for size, program in self._accumulate.items()}
        return accumulates | {"apply": str(self._apply.as_text())}

    def peak_bytes(self) -> int:
        """Temporary memory per device of the largest accumulate program, as XLA's analysis states it."""
        analyses = [program.memory_analysis() for program in self._accumulate.values()]
        return max((int(analysis.temp_size_in_bytes) for analysis in analyses if analysis is not None), default=0)

    @staticmethod
    def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _abstract(self, tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda x: self._shape(x.shape, x.dtype, sharding), tree)


def accumulate_sample(
    programs: StepPrograms, params: Any, sums: Array, microbatches: Iterable[Microbatch], loss_key: Array
) -> Array:
    """Clip and sum: the first half of a step, without a collective.

    Args:
        params: those of the state.
        sums: float32[devices * (d + diagnostics)], zeros before a step; consumed.
        microbatches: all of the step's sample, on the devices.
        loss_key: of the step, as `StepPrograms.loss_key` gives it.

    Returns:
        Each device's own clipped sum and diagnostics, laid out as `sums`.
    """
    for batch in microbatches:
        sums = programs.accumulate(params, sums, batch, loss_key)
    return sums


def noisy_update(
    programs: StepPrograms, state: TrainState, sums: Array, keys: Keys, step: int
) -> tuple[TrainState, Array, Array, Array | None]:
    """Add noise and update: the second half of a step. Draws the noise of `step` once; consumes `state` and `sums`.

    Returns:
        The state after the step; `sums` set to zero for the next one; the diagnostics by the names of `DIAGNOSTICS`,
        float32[4], summed over all devices; and the draw, float32[d], on the process that made it.
    """
    noise, draw = programs.draw(keys, step)
    state, sums, diagnostics = programs.apply(state, sums, noise)
    return state, sums, diagnostics, draw


def flatten(tree: Any) -> Float32[Array, " d"]:
    """All leaves as one float32 vector, in the order of `jax.tree.leaves`."""
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def unflatten(vector: Float32[Array, " d"], like: Any) -> Any:
    """The inverse of `flatten`, in float32 and with the structure and shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    edges = np.cumsum([0, *(leaf.size for leaf in leaves)])
    pieces = [vector[a:b].reshape(leaf.shape) for a, b, leaf in zip(edges[:-1], edges[1:], leaves, strict=True)]
    return jax.tree.unflatten(structure, pieces)
