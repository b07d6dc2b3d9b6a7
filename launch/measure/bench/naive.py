"""Naive DP-SGD in JAX: each Poisson batch in its own size, so that nearly every step compiles again."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from dpdist.mechanism.clipping import GradSum
from dpdist_launch.measure.bench.rounds import Clock
from dpdist_launch.measure.bench.tasks import Problem

#: Number of training examples; each is sampled with probability p / POPULATION, so that p are expected.
POPULATION = 50_000
STEPS = 5


def naive_series(
    grad_sum: GradSum, problem: Problem, *, steps: int = STEPS, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Measure the mean seconds of a step over a short series of binomial batch sizes, compilation included.

    Nothing is compiled before the series. In a short series most sizes are new, so most steps compile. With small
    batches, a long run would at last have seen every size; with logical batches of thousands of examples it never
    would.
    """
    compilations = 0

    def counted(params: Any, batch: Any, mask: Any) -> Any:
        nonlocal compilations
        compilations += 1  # runs only when JAX traces: once for every new shape
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
