"""The arms of jax_privacy's `clipped_grad`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax_privacy

from dpdist.mechanism.clipping import GradSum
from dpdist_launch.measure.bench.arms import JAX
from dpdist_launch.measure.bench.program import Arm, Program, jax_program
from dpdist_launch.measure.bench.tasks import Problem

#: Name and `microbatch_size` of each arm: by default all examples at once; one at a time, its sum is a loop that stores
#: no gradient but the sum, its fastest way where a gradient is large.
ARMS = {"jax_privacy": None, "jax_privacy loop": 1}


def jax_privacy_arms() -> list[Arm]:
    """Return the arms; other settings are defaults, except that the loss takes one example without a batch axis."""
    return [Arm(name=name, framework=JAX, private=True, prepare=partial(_program, size)) for name, size in ARMS.items()]


def _program(microbatch_size: int | None, problem: Problem) -> Program:
    return jax_program(_grad_sum(problem, microbatch_size), problem)


def _grad_sum(problem: Problem, microbatch_size: int | None) -> GradSum:
    clipped = jax_privacy.clipped_grad(
        problem.loss,
        l2_clip_norm=problem.clip_norm,
        keep_batch_dim=False,
        return_grad_norms=True,
        microbatch_size=microbatch_size,
    )

    def grad_sum(params: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
        sums, found = clipped(params, batch, is_padding_example=mask == 0)
        return sums, found.grad_norms

    return grad_sum
