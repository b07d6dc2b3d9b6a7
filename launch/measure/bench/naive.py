"""Naive DP-SGD in JAX: the Poisson batch as it comes, of another size every step, so that nearly every one compiles."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from dpdist.mechanism.clipping import GradSum
from dpdist_launch.measure.bench.rounds import Clock
from dpdist_launch.measure.bench.tasks import Problem

#: Training examples, each in a batch with probability p over their number, so that p are expected.
POPULATION = 50_000
STEPS = 5


def naive_series(
    grad_sum: GradSum, problem: Problem, *, steps: int = STEPS, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Mean seconds of a step over a short series of binomially distributed batch sizes, compilation included.

    Nothing is compiled before. The fewer sizes a series has seen, the more of its steps compile: with small batches a
    long run would meet every size at last, with the thousands of a logical batch it never does.
    """
    compilations = 0

    def counted(params: Any, batch: Any, mask: Any) -> Any:
        nonlocal compilations
        compilations += 1  # runs only while JAX traces, which it does once for every new shape
        return grad_sum(params, batch, mask)

    step = jax.jit(counted)
    sizes = np.random.default_rng(0).binomial(POPULATION, problem.size / POPULATION, steps).tolist()
    total = 0.0
    for number, size in enumerate(sizes):
        batch = jax.device_put(problem.task.examples(size, seed=number))
        mask = jax.device_put(np.ones(size, np.float32))
        began = clock()
        if size:  # an empty batch has no gradient to compute
            jax.block_until_ready(step(problem.params, batch, mask))
        total += clock() - began
    return {
        "seconds": total / steps,
        "examples_per_second": sum(sizes) / total,
        "steps": steps,
        "sizes": sizes,
        "compilations": compilations,
    }
