"""Turn example indices into arrays on the devices: read this process's rows, pad them with zeros, send them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int64, Shaped

from dpdist.data.sources import Source, read_rows

T = TypeVar("T")


class Placement:
    """Reads examples of one source for the devices of this process.

    Args:
        source: examples by index.
        mesh: the job's devices, along one axis; arrays are sharded over it by their first axis.
        workers: number of threads that call `__getitem__` if the source has no `take`.
    """

    def __init__(self, source: Source, mesh: Mesh, *, workers: int) -> None:
        self.source = source
        devices = list(mesh.devices.flat)
        #: Positions of this process's devices in the mesh.
        self.local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        self.devices = len(devices)
        self._mesh_devices = devices
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="dpdist-gather")

    def examples(self, rows: Int64[np.ndarray, " n"]) -> tuple[dict[str, Array], Shaped[np.ndarray, " n"]]:
        """Read the examples at `rows`: equally many for each local device, in mesh order; -1 gives a row of zeros.

        Returns:
            Columns [devices * n / local devices, ...] sharded over the mesh, and this process's mask bool[n], True
            for real rows.
        """
        data, real = self.read(rows)
        return {name: self.send(values) for name, values in data.items()}, real

    def read(
        self, rows: Int64[np.ndarray, " n"]
    ) -> tuple[dict[str, Shaped[np.ndarray, "n ..."]], Shaped[np.ndarray, " n"]]:
        """Read the examples at `rows`, on the host: columns [n, ...] and the mask bool[n]; -1 gives a row of zeros."""
        real = rows >= 0
        data = {}
        for name, values in read_rows(self.source, rows[real], self._pool).items():
            data[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
            data[name][real] = values
        return data, real

    def put(self, tree: T, position: int) -> T:
        """Place a pytree of arrays on one of this process's devices, by its position in the mesh."""
        return jax.device_put(tree, self._mesh_devices[position])

    def send(self, local: Shaped[np.ndarray, "n ..."]) -> Array:
        """Make an array sharded over the mesh by its first axis, from this process's slice `local`."""
        shape = (local.shape[0] // len(self.local) * self.devices, *local.shape[1:])
        return jax.make_array_from_process_local_data(self._sharding, local, shape)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
