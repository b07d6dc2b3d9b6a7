"""A job of one process, made without joining one: for tests that need a `World` and no others in it."""

from __future__ import annotations

import jax
import numpy as np

from dpdist.cluster.environment import Membership
from dpdist.cluster.world import AXIS, World


def alone(devices: int = 1) -> World:
    """This process, with so many of its CPU devices."""
    membership = Membership(
        process_id=0,
        num_processes=1,
        coordinator_address="127.0.0.1:0",
        local_device_ids=None,
        host_index=0,
        num_hosts=1,
        launcher="single",
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    return World(
        membership=membership, mesh=mesh, host_of_device=(0,) * devices, nodes=("here",), timeout=10, distributed=False
    )
