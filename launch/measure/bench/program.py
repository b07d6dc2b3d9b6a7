"""Arms, their compiled programs, and XLA's memory and cost analysis of these."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dpdist.mechanism.clipping import GradSum
from dpdist.mechanism.clipping.paths import paths_of
from dpdist_launch.measure.bench.tasks import Problem

#: Gradient sums by the path of their parameter.
Sums = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """XLA's analysis of a compiled program."""

    #: Wall time of tracing and compiling.
    seconds: float
    #: Peak memory in addition to arguments and results.
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    #: Floating-point operations as XLA counts them; None if it does not.
    flops: float | None

    @property
    def memory(self) -> int:
        """Total bytes that a call needs."""
        return self.temp_bytes + self.argument_bytes + self.output_bytes


@dataclass(frozen=True, kw_only=True)
class Program:
    """One arm on one problem; compiled, if its framework compiles ahead of time."""

    #: Computes the batch's gradient sum once and waits for the result.
    run: Callable[[], Any]
    #: Turns the result of `run` into gradient sums with the names and layout of dpdist's parameters.
    read: Callable[[Any], Sums]
    #: None if the framework does not compile ahead of time.
    compiled: Compiled | None = None
    #: Compiles for another physical batch size, without running anything.
    compile_at: Callable[[int], Compiled] | None = None
    #: Returns the compiled program's text (optimised HLO).
    text: Callable[[], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute the gradient sum of a physical batch."""

    name: str
    #: Its times are compared with the plain SGD gradient of the same framework.
    framework: str
    #: True if it clips, False for plain SGD.
    private: bool
    prepare: Callable[[Problem], Program]


def jax_program(grad_sum: GradSum, problem: Problem) -> Program:
    """Compile `grad_sum(params, batch, mask)` for the problem."""
    arguments = (problem.params, problem.batch, problem.mask)
    executable, analysis = compiled(grad_sum, arguments)

    def compile_at(size: int) -> Compiled:
        batch, mask = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), (problem.batch, problem.mask)
        )
        return compiled(grad_sum, (problem.params, batch, mask))[1]

    return Program(
        run=lambda: jax.block_until_ready(executable(*arguments)),
        read=lambda result: dict(zip(paths_of(result[0]), map(np.asarray, jax.tree.leaves(result[0])), strict=True)),
        compiled=analysis,
        compile_at=compile_at,
        text=executable.as_text,
    )


def compiled(grad_sum: GradSum, arguments: tuple[Any, Any, Any]) -> tuple[Any, Compiled]:
    """Compile `grad_sum(params, batch, mask)` for arguments, or for their shapes; returns it with XLA's analysis."""
    began = time.perf_counter()
    executable = jax.jit(grad_sum).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory: Any = executable.memory_analysis()
    costs = executable.cost_analysis() or {}
    return executable, Compiled(
        seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        flops=costs.get("flops"),
    )


#: Larger batches do not occur in practice and would take long to compile.
LARGEST = 2**16


def largest_batch(compile_at: Callable[[int], Compiled], *, limit: float, start: int) -> int | None:
    """Find the largest power of two whose program needs at most `limit` bytes by XLA's analysis; None if 1 needs more.

    The search doubles or halves from the power of two at or below `start`, and ends at LARGEST.
    """
    size = 1 << (start.bit_length() - 1)
    if not _fits(compile_at, size, limit):
        while size > 1:
            size //= 2
            if _fits(compile_at, size, limit):
                return size
        return None
    while size < LARGEST and _fits(compile_at, 2 * size, limit):
        size *= 2
    return size


def _fits(compile_at: Callable[[int], Compiled], size: int, limit: float) -> bool:
    try:
        return compile_at(size).memory <= limit
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # a GPU's compiler rejects a program that cannot fit
            return False
        raise
