"""Exact test metrics on held-out examples, computed over all devices of the job."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dpdist.config.user_errors import users_code
from dpdist.data.placement import Placement
from dpdist.data.sources import Source, read_rows
from dpdist.errors import InputError
from dpdist.models import Model
from dpdist.models.tasks import RESERVED, Loss, Task

#: What the loss is called among a task's statistics, and a user's metric.
_LOSS, _OWN = "loss of the model", "metric "
#: Bytes of outputs that a device holds at a time: 16 sequences of 1,024 tokens of GPT-2's vocabulary would take 3 GB.
_OUTPUTS = 1 << 28
#: Batches that the devices may be given before the host has the results of the first.
_AHEAD = 2


class Evaluator:
    """Measures every test example once, and makes the metrics of all of them, whatever the number of devices.

    Each device keeps nothing: the statistics of its examples (`Task.statistics`) go to the host, and one collective
    at the end gives all of them to all processes.

    Args:
        model: its `apply` gives outputs, and its `loss` the loss that is measured.
        task: what is made of the outputs.
        own: further metrics, as `dpdist.models.tasks.own_metrics` gives them.
        params: the parameters' shapes.
        source: the test examples, in memory or not; each process reads only its devices' part.
        mesh: the job's devices.
        batch_size: examples a device evaluates at once.
        workers: threads for sources without `take`.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        own: Mapping[str, Loss],
        params: Any,
        source: Source,
        mesh: Mesh,
        *,
        batch_size: int,
        workers: int,
    ) -> None:
        self._task, self._own, self._total = task, list(own), len(source)
        self._placement = Placement(source, mesh, workers=workers)
        self._devices = mesh.devices.size
        self._batch = min(batch_size, -(-len(source) // self._devices))
        self._batches = -(-self._total // (self._devices * self._batch))
        axis = mesh.axis_names[0]
        sharded, replicated = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())
        measure = _measures(model, task, own)

        example = read_rows(source, np.array([0]))
        one = {name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in example.items()}
        outputs = jax.eval_shape(model.apply, params, one)
        at_a_time = max(1, _OUTPUTS // max(1, outputs.size * outputs.dtype.itemsize))

        def local_rows(params: Any, batch: dict[str, Array]) -> Array:
            if at_a_time >= self._batch:
                found = jax.vmap(measure, in_axes=(None, 0))(params, batch)
            else:
                found = jax.lax.map(lambda each: measure(params, each), batch, batch_size=at_a_time)
            rows = [found[name].reshape(self._batch, -1).astype(jnp.float32) for name in self._shapes]
            return jnp.concatenate(rows, axis=1)

        each_device = jax.shard_map(
            local_rows,
            mesh=mesh,
            check_vma=False,
            in_specs=(PartitionSpec(), PartitionSpec(axis)),
            out_specs=PartitionSpec(axis),
        )
        #: Shape of each statistic of one example, by name.
        with users_code("model.metrics", ", ".join(own) or task.name, traced=True):
            self._shapes = {name: x.shape for name, x in jax.eval_shape(measure, params, one).items()}
        batch = {
            name: jax.ShapeDtypeStruct((self._devices * self._batch, *x.shape), x.dtype, sharding=sharded)
            for name, x in one.items()
        }
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), params)
        self._measure = jax.jit(each_device).lower(abstract, batch).compile()
        width = sum(math.prod(shape) for shape in self._shapes.values())
        all_rows = jax.ShapeDtypeStruct(
            (self._devices * self._batches * self._batch, width), jnp.float32, sharding=sharded
        )
        with np.errstate(all="ignore"), users_code("model.task", task.name):
            told = self._metrics(np.zeros((2, width)))
        if wrong := told.keys() & RESERVED:
            remedy = f"gives a metric the name {min(wrong)}, which is that of another number; rename it."
            raise InputError("model.task", task.name, remedy)
        self._share = jax.jit(lambda rows: rows, out_shardings=replicated).lower(all_rows).compile()

    def measure(self, params: Any, *, stop: Callable[[], bool] = lambda: False) -> dict[str, float | None] | None:
        """The task's metrics, the user's own and the mean `loss`, of all test examples; collective.

        Args:
            stop: called after each batch, equally often on all processes; it ends early once it returns True.

        Returns:
            By name, the task's `primary` first; None for what is not finite or not defined on these examples. None
            in all where it ended early.
        """
        place, whole = self._placement, self._devices * self._batch
        local: list[np.ndarray] = []
        waiting: deque[Array] = deque()

        def fetch(left: int) -> None:
            while len(waiting) > left:
                local.append(_rows_of_this_process(waiting.popleft(), place.local, self._batch))

        for first in range(0, self._total, whole):
            rows = np.concatenate([first + device * self._batch + np.arange(self._batch) for device in place.local])
            batch, _ = place.examples(np.where(rows < self._total, rows, -1))
            waiting.append(self._measure(params, batch))
            fetch(_AHEAD)
            if stop():
                return None
        fetch(0)
        # [batches, local devices, batch, ...] -> one slice a device
        own = np.stack(local).swapaxes(0, 1).reshape(len(place.local) * self._batches * self._batch, -1)
        every = np.asarray(self._share(place.send(own)))
        every = every.reshape(self._devices, self._batches, self._batch, -1).swapaxes(0, 1)
        return self._metrics(every.reshape(-1, every.shape[-1])[: self._total].astype(np.float64))

    def _metrics(self, rows: np.ndarray) -> dict[str, float | None]:
        """The metrics of all test examples' statistics, float64[n, width], in order."""
        statistics, at = {}, 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            statistics[name] = rows[:, at : at + size].reshape(len(rows), *shape)
            at += size
        means = {name: statistics.pop(_OWN + name).mean() for name in self._own}
        if _LOSS in statistics:
            means["loss"] = statistics.pop(_LOSS).mean()
        found = dict(self._task.metrics(statistics)) | means
        names = sorted(found, key=lambda name: name != self._task.primary)  # the others keep their order
        return {name: float(found[name]) if math.isfinite(found[name]) else None for name in names}

    def close(self) -> None:
        """Stop the threads that read examples."""
        self._placement.close()


def _measures(model: Model, task: Task, own: Mapping[str, Loss]) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """`f(params, example)`: all statistics of one test example, by name."""

    def measure(params: Any, example: dict[str, Array]) -> dict[str, Array]:
        outputs = model.apply(params, example)
        found = dict(task.statistics(outputs, example))
        found |= {_OWN + name: function(outputs, example) for name, function in own.items()}
        try:
            loss = model.loss(outputs, example) if model.loss is not None else None
        except KeyError as missing:
            if missing.args != ("key",):
                raise
            loss = None  # a loss of the user's own that is random in training alone: it has no value here
        return found if loss is None else found | {_LOSS: loss}

    return measure


def _rows_of_this_process(rows: Array, local: list[int], batch: int) -> np.ndarray:
    """[local devices, batch, width] of an array sharded over the mesh, in the order of `local`."""
    held = {shard.index[0].start or 0: np.asarray(shard.data) for shard in rows.addressable_shards}
    return np.stack([held[position * batch] for position in local])
