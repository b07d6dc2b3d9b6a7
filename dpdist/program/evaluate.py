"""Exact accuracy on held-out examples, computed over all devices of the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dpdist.data.placement import Placement
from dpdist.data.sources import Source, read_rows
from dpdist.models import Model


class Evaluator:
    """Counts correct predictions; every test example is counted once, whatever the number of devices.

    Args:
        model: its `apply` gives logits, whose argmax is compared with `example["label"]`.
        params: the parameters' shapes.
        source: the test examples, in memory or not; each process reads only its devices' part.
        mesh: the job's devices.
        batch_size: examples a device evaluates at once.
        workers: threads for sources without `take`.
    """

    def __init__(self, model: Model, params: Any, source: Source, mesh: Mesh, *, batch_size: int, workers: int) -> None:
        self._placement = Placement(source, mesh, workers=workers)
        self._devices = mesh.devices.size
        self._batch = min(batch_size, -(-len(source) // self._devices))
        axis = mesh.axis_names[0]
        sharded, replicated = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())

        def local_count(params: Any, correct: Array, batch: dict[str, Array], mask: Array) -> Array:
            logits = jax.vmap(model.apply, in_axes=(None, 0))(params, batch)
            hits = (jnp.argmax(logits, axis=-1) == batch["label"]) & mask
            return correct + jnp.sum(hits, dtype=jnp.int32)

        count = jax.shard_map(
            local_count,
            mesh=mesh,
            check_vma=False,
            out_specs=PartitionSpec(axis),
            in_specs=(PartitionSpec(), PartitionSpec(axis), PartitionSpec(axis), PartitionSpec(axis)),
        )

        def shape(rows: int, *axes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self._devices * rows, *axes), dtype, sharding=sharded)

        example = read_rows(source, np.array([0]))
        batch = {name: shape(self._batch, *value.shape[1:], dtype=value.dtype) for name, value in example.items()}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), params)
        self._count = jax.jit(count).lower(abstract, shape(1), batch, shape(self._batch, dtype=jnp.bool_)).compile()
        self._total = jax.jit(jnp.sum, out_shardings=replicated).lower(shape(1)).compile()

    def accuracy(self, params: Any, *, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Correct predictions over the number of test examples; collective.

        Args:
            stop: called after each batch, equally often on all processes; the count ends early once it returns True.

        Returns:
            The accuracy, or None where the count ended early.
        """
        place, total = self._placement, len(self._placement.source)
        correct = place.send(np.zeros(len(place.local), np.int32))
        for first in range(0, total, self._devices * self._batch):
            rows = np.concatenate([first + device * self._batch + np.arange(self._batch) for device in place.local])
            batch, mask = place.examples(np.where(rows < total, rows, -1))
            correct = self._count(params, correct, batch, place.send(mask))
            if stop():
                return None
        return int(self._total(correct)) / total

    def close(self) -> None:
        """Stop the threads that read examples."""
        self._placement.close()
