"""Test the compiled programs of a run before its first step: `self_test`, on a device of this process."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from dpdist.errors import InputError
from dpdist.mechanism.step import Microbatch, StepPrograms
from dpdist.program import self_test


def summing(programs: StepPrograms, grid: float) -> self_test.Accumulate:
    """The compiled sum of one physical batch on a device of this process, as float64[d] on the host."""
    position, device = next(iter(programs.local.items()))
    key = jax.device_put(np.zeros(2, np.uint32), device)

    def accumulate(params: Any, batch: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        microbatch = jax.device_put(Microbatch(batch, mask, np.zeros(len(mask), np.int32)), device)
        zeros = programs.slices(programs.zero_sums())[position]
        sums = programs.accumulate(position, jax.device_put(params, device), zeros, microbatch, key)
        return np.asarray(sums)[: programs.parameters] * grid

    return accumulate


def require_guards(
    programs: StepPrograms,
    params: Any,
    example: dict[str, jax.ShapeDtypeStruct],
    batch_sizes: Collection[int],
    *,
    clip_norm: float,
    grid: float,
    precision: str,
) -> None:
    """Check that the programs bound what one example adds, as compiled: a flag may tell XLA to drop what does.

    Args:
        precision: if `tensor`, also that products lose no more than the bound on them assumes.

    Raises:
        InputError: they do not.
    """
    if precision == "tensor":
        try:
            self_test.check_products(("bfloat16", "tf32"))
        except self_test.BrokenGuardError as error:
            raise InputError(
                "training.precision", precision, f"{error} on this device; give training.precision=highest."
            ) from None

    try:
        self_test.check(summing(programs, grid), params, example, batch_sizes, clip_norm=clip_norm)
    except self_test.BrokenGuardError as error:
        raise InputError(
            "XLA_FLAGS",
            os.environ.get("XLA_FLAGS", ""),
            f"{error}, so as compiled here nothing bounds one record; take out what lets XLA ignore NaNs and "
            "infinities, such as --xla_cpu_enable_fast_math.",
        ) from None
