"""A job that has been joined: the processes, the devices, and which of them share a host."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dpdist.cluster.environment import Membership

#: Name of the only axis of the mesh.
AXIS = "data"


@dataclass(frozen=True, kw_only=True)
class World:
    """What every process of the job knows after `join`."""

    membership: Membership
    #: All devices of the job along `AXIS`, ordered by process, then by device id.
    mesh: jax.sharding.Mesh
    #: Host index of each device of the mesh; devices with the same index share a host and its shard.
    host_of_device: tuple[int, ...]
    #: Seconds after which a barrier or an agreement gives up.
    timeout: float
    #: False where a notebook had started JAX before us: one process, and no preemption notice.
    distributed: bool

    @property
    def process_id(self) -> int:
        return self.membership.process_id

    @property
    def num_processes(self) -> int:
        return self.membership.num_processes

    @property
    def is_main(self) -> bool:
        """True on process 0, which decides whatever depends on one host (files, clocks)."""
        return self.process_id == 0

    @property
    def device_count(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        """`cpu` or `gpu`; `join` has made sure that all processes have the same."""
        return str(self.mesh.devices.flat[0].platform)
