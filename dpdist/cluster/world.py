"""The processes and devices of a running job, and which devices share a host."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dpdist.cluster.environment import Membership

#: Name of the only axis of the mesh.
AXIS = "data"


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes and devices of a job, as `join` returns them; equal on all processes but for `membership`."""

    membership: Membership
    #: All devices of the job along `AXIS`, ordered by process, then by device id.
    mesh: jax.sharding.Mesh
    #: Host index of each device of the mesh; devices with the same index share a host and its data shard.
    host_of_device: tuple[int, ...]
    #: Name of each process's node, by rank: SLURM's, or its host name. Private: an export must not tell them.
    nodes: tuple[str, ...]
    #: Seconds after which a barrier or an agreement raises TimeoutError.
    timeout: float
    #: False if JAX was already running when we joined, as in a notebook: one process, and no preemption notice.
    distributed: bool

    @property
    def process_id(self) -> int:
        """This process's rank, from 0."""
        return self.membership.process_id

    @property
    def num_processes(self) -> int:
        """Number of processes of the job."""
        return self.membership.num_processes

    @property
    def is_main(self) -> bool:
        """True on process 0, which makes every decision that depends on one host (files, clocks)."""
        return self.process_id == 0

    @property
    def device_count(self) -> int:
        """Number of devices of all processes together."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """`cpu` or `gpu`; `join` has checked that it is the same on all processes."""
        return str(self.mesh.devices.flat[0].platform)
