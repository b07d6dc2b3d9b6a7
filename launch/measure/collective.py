"""The all-reduce of a step as a separate program, to time it alone."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


def all_reduce_program(sums: Array, mesh: Mesh) -> Any:
    """Compile `sums -> total`: only the all-reduce of the vector of a step's sums."""
    axis = mesh.axis_names[0]
    reduce = jax.shard_map(
        lambda x: lax.psum(x, axis),
        mesh=mesh,
        check_vma=False,
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(),
    )
    with jax.enable_x64(True):  # private sums are 64-bit integers
        return jax.jit(reduce).lower(sums).compile()


def all_reduce_seconds(program: Any, sums: Array, *, calls: int) -> float:
    """Return the median seconds of one all-reduce over `calls` calls. Collective: every process must call it.

    An untimed all-reduce precedes each timed one. A process leaves an all-reduce only after all have entered it, so the
    timed one starts nearly at once everywhere and does not include the wait for the last process.
    """
    seconds = []
    for _ in range(calls):
        jax.block_until_ready(program(sums))
        began = time.perf_counter()
        jax.block_until_ready(program(sums))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
