"""One DP-SGD step: clip and sum (`accumulate_sample`), then add noise and update (`noisy_update`).

Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1, with Poisson subsampling: the update uses

    (sum_{i in sample} clip_C(g_i) + N(0, sigma^2 C^2 I)) / B,     B = q N constant.

Between clipping and noise all sums are integers, in units of a public grid (see `grid`): exact, in any order.

`StepPrograms` compiles every shape that can occur before the first step and calls compiled programs, which reject any
other shape instead of compiling again. All that computes with floating-point numbers, `accumulate` and `update`, is
compiled for a single device and launched on each: as a program of several devices XLA would compute other bits than as
one of one. Only `reduce` is a program of all devices. It holds integers and the collectives: one vector of parameter
size for the sums, and one more where the noise is shared as `designated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float32

from dpdist.mechanism.clipping import GradSum
from dpdist.mechanism.clipping.paths import trainable, with_frozen
from dpdist.mechanism.grid import to_grid
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.noise import block_size, integer_noise

#: What the all-reduce carries behind the gradient sum: counts and norms that go to private/ only.
DIAGNOSTICS = ("examples", "clipped", "not_finite", "norm_sum")
#: So that they fit the grid of the sums: what counts for 1 there adds about C, and so does a norm of so many times C.
_LARGEST_NORM = 2.0**10


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


#: (state, mean gradient [d]) -> the state after the step.
Update = Callable[[TrainState, Float32[Array, " d"]], TrainState]


class Microbatch(NamedTuple):
    """p examples on one device: a pytree of arrays, a mask (0 is padding) and the example indices."""

    data: Any
    mask: Any
    index: Any


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What a step computes, on which mesh: all that its programs are compiled from."""

    #: `f(params, batch, mask) -> (sums, norms)`, clipped, or plain for the non-private arm; with the same `frozen`.
    grad_sum: GradSum
    #: Shapes (or arrays) of the state.
    state: TrainState
    #: One example as a pytree of shapes and dtypes, without the leading axis.
    example: dict[str, jax.ShapeDtypeStruct]
    #: What the noisy mean gradient makes of the state; it sees nothing else of the data.
    update: Update
    #: One axis; its first device is the designated one.
    mesh: Mesh
    #: The physical batch sizes (examples a device) that microbatches may have.
    batch_sizes: Collection[int]
    #: B, the constant that sums are divided by.
    normaliser: float
    #: C, for the count of clipped examples; infinite when nothing is clipped.
    clip_norm: float
    #: The standard deviation of the noise on the sum, and the spacing of the sum's grid; both None in a plain run,
    #: whose sums are float32.
    noise_scale: float | None
    grid: float | None
    placement: Literal["designated", "fused"]
    #: True gives each example a `key` of its own, derived from the step's loss key and its index.
    randomised: bool
    #: Paths of parameters that do not train: they get no sum, no noise and no update.
    frozen: Collection[str] = frozenset()


class StepPrograms:
    """The programs of a run, compiled for one mesh before the first step."""

    def __init__(self, spec: StepSpec) -> None:
        if spec.noise_scale is not None and spec.grid is None:
            raise ValueError("noise is drawn on a grid, so a step with a noise scale needs one")
        mesh = spec.mesh
        axis = mesh.axis_names[0]
        self._spec, self._axis = spec, axis
        self.devices = mesh.devices.size
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(axis))
        self.designated = mesh.devices.flat[0]
        #: This process's devices by their position in the mesh.
        self.local = {i: d for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()}
        moving = trainable(spec.state.params, spec.frozen)
        self.parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(moving))
        #: The unit of the diagnostics, a power of two; 1 in a plain run.
        one = 1.0 if spec.grid is None else 2.0 ** math.floor(math.log2(spec.clip_norm))
        self._unit = np.array([one, one, one, 1.0 if spec.grid is None else 1 / _LARGEST_NORM], np.float32)
        self.blocks = -(-self.parameters // block_size(self.parameters))
        width, kind = self.parameters + len(DIAGNOSTICS), jnp.float32 if spec.grid is None else jnp.int64

        state, total, key = _as_on_devices(spec.state), _shape((width,), kind), _shape((2,), jnp.uint32)
        accumulates = {
            size: self._on_each_device(
                self._accumulate_on_device, state.params, total, self._microbatch(size), key, consumed=1
            )
            for size in sorted(set(spec.batch_sizes))
        }
        update = self._on_each_device(self._update_on_device, state, total, consumed=0)
        self._width, self._kind, draw = width, kind, None
        whole = [_shape((self.devices * width,), kind, self.sharded)]
        self._noise_shape = (self.devices * self.parameters,)
        if spec.grid is not None and spec.noise_scale is not None:
            noise = jax.jit(partial(integer_noise, coordinates=self.parameters, units=spec.noise_scale / spec.grid))
            keys = _shape((self.blocks, 3, 2), jnp.uint32, SingleDeviceSharding(self.designated))
            draw = _lower(noise, keys) if self.draws else None
            self._silence = [_zeros(self.parameters, kind, to) for to in self.local.values() if to != self.designated]
            whole.append(_shape(self._noise_shape, kind, self.sharded))
        reduce = jax.shard_map(
            self._reduce_on_device,
            mesh=mesh,
            check_vma=False,
            in_specs=PartitionSpec(axis),
            out_specs=(PartitionSpec(), PartitionSpec(axis)),
        )
        lowered = accumulates, update, draw, _lower(jax.jit(reduce, donate_argnums=0), *whole)
        with ThreadPoolExecutor() as pool:  # XLA compiles several programs at once
            futures = jax.tree.map(lambda program: pool.submit(program.compile), lowered)
            self._accumulate, self._update, self._draw, self._reduce = jax.tree.map(lambda each: each.result(), futures)

    def _on_each_device(self, function: Callable[..., Any], *shapes: Any, consumed: int) -> dict[int, Any]:
        """One program for each of this process's devices, by position; the same code on all of them."""
        jitted = jax.jit(function, donate_argnums=consumed)
        return {
            position: _lower(jitted, *jax.tree.map(partial(_placed, SingleDeviceSharding(device)), shapes))
            for position, device in self.local.items()
        }

    def _accumulate_on_device(self, params: Any, acc: Array, batch: Microbatch, key: Array) -> Array:
        """Add the (clipped) gradient sum and the diagnostics of one microbatch to the device's accumulator."""
        spec, data = self._spec, batch.data
        with jax.enable_x64(False):  # the user's loss computes as it would outside
            if spec.randomised:
                root = jax.random.wrap_key_data(key, impl="threefry2x32")
                data = data | {"key": jax.vmap(partial(jax.random.fold_in, root))(batch.index)}
            sums, norms = spec.grad_sum(params, data, batch.mask)
            flat, used = flatten(sums), batch.mask > 0
            finite = used & jnp.isfinite(norms)
            norms = jnp.where(finite, jnp.minimum(norms, spec.clip_norm * _LARGEST_NORM), 0.0)
            counts = [used, finite & (norms > spec.clip_norm), used & ~finite, norms]
            diagnostics = jnp.stack([jnp.sum(values).astype(jnp.float32) for values in counts])
            flat = jnp.concatenate([flat, diagnostics * self._unit])
            if spec.grid is None:
                return acc + flat
        # The barrier keeps XLA from rounding each leaf within the concatenation, which takes 50 times as long on CPU.
        return acc + to_grid(lax.optimization_barrier(flat), spec.grid)

    def _reduce_on_device(self, acc: Array, noise: Array | None = None) -> tuple[Array, Array]:
        """One device's part of `reduce`: add all devices' sums, and the noise; and zeros for the next step."""
        if noise is not None and self._spec.placement == "fused":
            acc = acc.at[: self.parameters].add(noise)
        total = lax.psum(acc, self._axis)
        if noise is not None and self._spec.placement == "designated":
            # The barrier keeps XLA from adding before it reduces, which is `fused`. It may still carry both
            # vectors in one operation.
            total, noise = lax.optimization_barrier((total, noise))
            # Every device but the designated one holds zeros.
            total = total.at[: self.parameters].add(lax.psum(noise, self._axis))
        return total, jnp.zeros_like(acc)

    def _update_on_device(self, state: TrainState, total: Array) -> tuple[TrainState, Array]:
        """Divide the noisy sum by B and update; all of it post-processes `total`, which every device holds."""
        spec = self._spec
        summed, diagnostics = total[: self.parameters], total[self.parameters :]
        if spec.grid is None:
            mean = summed / jnp.float32(spec.normaliser)
        else:
            mean = (summed.astype(jnp.float64) * (spec.grid / spec.normaliser)).astype(jnp.float32)
            diagnostics = (diagnostics.astype(jnp.float64) * (spec.grid / self._unit)).astype(jnp.float32)
        with jax.enable_x64(False):
            return spec.update(state, mean), diagnostics

    def _microbatch(self, size: int) -> Microbatch:
        example = _as_on_devices(self._spec.example)
        data = {name: _shape((size, *x.shape), x.dtype) for name, x in example.items()}
        return Microbatch(data, _shape((size,), jnp.float32), _shape((size,), jnp.int32))

    @property
    def draws(self) -> bool:
        """True on the one process that owns the designated device."""
        return self.designated.process_index == jax.process_index()

    def zero_sums(self) -> Array:
        """The accumulator before a step: [devices * (d + diagnostics)], one slice a device, int64 or float32."""
        return self.whole({i: _zeros(self._width, self._kind, to) for i, to in self.local.items()}, self.sharded)

    def loss_key(self, keys: Keys, step: int) -> dict[int, Array]:
        """The step's key for randomised losses, on every device of this process."""
        return {position: jax.device_put(keys.loss(step), device) for position, device in self.local.items()}

    def slices(self, tree: Any) -> dict[int, Any]:
        """What each of this process's devices holds of arrays that are spread over, or replicated on, the mesh."""
        leaves, structure = jax.tree.flatten(tree)
        held = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
        return {i: jax.tree.unflatten(structure, [each[to] for each in held]) for i, to in self.local.items()}

    def whole(self, slices: Mapping[int, Any], sharding: NamedSharding) -> Any:
        """The inverse of `slices`."""
        copies = 1 if sharding.is_fully_replicated else self.devices

        def join(*parts: Array) -> Array:
            shape = (copies * parts[0].shape[0], *parts[0].shape[1:]) if parts[0].shape else ()
            return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

        return jax.tree.map(join, *(slices[position] for position in self.local))

    def accumulate(self, position: int, params: Any, acc: Array, batch: Microbatch, loss_key: Array) -> Array:
        """Add the (clipped) gradient sum of one microbatch on one device to its slice `acc`, which is consumed."""
        return self._accumulate[batch.mask.shape[0]][position](params, acc, batch, loss_key)

    def draw(self, keys: Keys, step: int) -> tuple[Array | None, Array | None]:
        """The noise of a step as an array with one slice a device, and the draw itself where it was made.

        In units of the grid. Only the designated device draws; all other slices are zero. Both None in a plain run.
        """
        if self._spec.noise_scale is None:
            return None, None
        own = []
        if self._draw is not None:
            own = [self._draw(jax.device_put(keys.noise(step, self.blocks), self.designated))]
        noise = jax.make_array_from_single_device_arrays(self._noise_shape, self.sharded, own + self._silence)
        return noise, own[0] if own else None

    def apply(self, state: TrainState, acc: Array, noise: Array | None) -> tuple[TrainState, Array, Array]:
        """All-reduce, add the noise, update. Consumes state and acc; returns (state, zeroed acc, diagnostics)."""
        total, acc = self._reduce(acc) if noise is None else self._reduce(acc, noise)
        before, totals = self.slices(state), self.slices(total)
        after = {position: update(before[position], totals[position]) for position, update in self._update.items()}
        state, diagnostics = self.whole(after, self.replicated)
        return state, acc, diagnostics

    def compiled(self) -> dict[str, Any]:
        """The compiled programs by name, of one device where each has its own: for XLA's analyses and texts of them."""
        first = next(iter(self.local))
        accumulates = {f"accumulate_{size}": each[first] for size, each in self._accumulate.items()}
        return accumulates | {"update": self._update[first], "reduce": self._reduce}


def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(sharding: SingleDeviceSharding, x: Any) -> jax.ShapeDtypeStruct:
    return _shape(x.shape, x.dtype, sharding)


def _as_on_devices(tree: Any) -> Any:
    """The shapes with the types that JAX gives them without 64-bit types: those of 64 bits arrive as 32."""
    return jax.tree.map(lambda x: _shape(x.shape, dtypes.canonicalize_dtype(x.dtype)), tree)


def _zeros(size: int, kind: Any, device: Any) -> Array:
    with jax.enable_x64(True):
        return jax.device_put(np.zeros(size, kind), device)


def _lower(jitted: Any, *shapes: Any) -> Any:
    with jax.enable_x64(True):
        return jitted.lower(*shapes)


def accumulate_sample(
    programs: StepPrograms,
    params: Any,
    sums: Array,
    rounds: Iterable[Mapping[int, Microbatch]],
    loss_key: Mapping[int, Array],
) -> Array:
    """Clip and sum: the first half of a step, without a collective.

    Args:
        params: those of the state.
        sums: [devices * (d + diagnostics)], zeros before a step; consumed.
        rounds: all of the step's sample: by position of the device, one microbatch after the other.
        loss_key: of the step, as `StepPrograms.loss_key` gives it.

    Returns:
        Each device's own clipped sum and diagnostics, laid out as `sums`.
    """
    own, accs = programs.slices(params), programs.slices(sums)
    for batches in rounds:
        for position, batch in batches.items():
            accs[position] = programs.accumulate(position, own[position], accs[position], batch, loss_key[position])
    return programs.whole(accs, programs.sharded)


def noisy_update(
    programs: StepPrograms, state: TrainState, sums: Array, keys: Keys, step: int
) -> tuple[TrainState, Array, Array, Array | None]:
    """Add noise and update: the second half of a step. Draws the noise of `step` once; consumes `state` and `sums`.

    Returns:
        The state after the step; `sums` set to zero for the next one; the diagnostics by the names of `DIAGNOSTICS`,
        float32[4], summed over all devices; and the draw, int64[d] in units of the grid, on the process that made it.
    """
    noise, draw = programs.draw(keys, step)
    state, sums, diagnostics = programs.apply(state, sums, noise)
    return state, sums, diagnostics, draw


def flatten(tree: Any) -> Float32[Array, " d"]:
    """All leaves as one float32 vector, in the order of `jax.tree.leaves`."""
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])
