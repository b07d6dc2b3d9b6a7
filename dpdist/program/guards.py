"""Test the compiled programs of a run before its first step: `mechanism.self_test`, on this process's own device."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from dpdist.errors import InputError
from dpdist.mechanism import self_test
from dpdist.mechanism.step import Microbatch, StepPrograms


def require_guards(
    programs: StepPrograms,
    params: Any,
    example: dict[str, jax.ShapeDtypeStruct],
    batch_sizes: Collection[int],
    *,
    clip_norm: float,
) -> None:
    """Check that the programs bound what one example adds, as compiled: a flag may tell XLA to drop what does.

    Raises:
        InputError: they do not.
    """

    def spread(array: Any, sharding: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    def on_every_device(rows: np.ndarray) -> jax.Array:
        copies = len(programs.replicated.mesh.local_devices)
        return spread(np.concatenate([rows] * copies), programs.sharded)

    def accumulate(params: Any, batch: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        microbatch = Microbatch(batch, mask, np.zeros(len(mask), np.int32))
        key = spread(np.zeros(2, np.uint32), programs.replicated)
        placed = jax.tree.map(lambda x: spread(x, programs.replicated), params)
        sums = programs.accumulate(placed, programs.zero_sums(), jax.tree.map(on_every_device, microbatch), key)
        return np.asarray(sums.addressable_shards[0].data)[: programs.parameters]

    try:
        self_test.check(accumulate, params, example, batch_sizes, clip_norm=clip_norm)
    except self_test.BrokenGuardError as error:
        raise InputError(
            "XLA_FLAGS",
            os.environ.get("XLA_FLAGS", ""),
            f"{error}, so as compiled here nothing bounds one record; take out what lets XLA ignore NaNs and "
            "infinities, such as --xla_cpu_enable_fast_math.",
        ) from None
