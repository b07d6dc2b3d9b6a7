"""The all-reduce of a step as a program of its own, to time it alone."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


def all_reduce_program(sums: Array, mesh: Mesh) -> Any:
    """Compiled `sums -> total`: the vector that `Step.apply` reduces, reduced and nothing else."""
    axis = mesh.axis_names[0]
    reduce = jax.shard_map(
        lambda x: lax.psum(x, axis),
        mesh=mesh,
        check_vma=False,
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(),
    )
    return jax.jit(reduce).lower(sums).compile()


def all_reduce_seconds(program: Any, sums: Array, *, calls: int) -> float:
    """Median seconds of one all-reduce, over `calls` calls; every process of the job calls this.

    Before each timed call comes one that is not: a process leaves an all-reduce only when all have entered it, so
    that what is timed is the reduction and not the wait for the last to arrive.
    """
    seconds = []
    for _ in range(calls):
        jax.block_until_ready(program(sums))
        began = time.perf_counter()
        jax.block_until_ready(program(sums))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
