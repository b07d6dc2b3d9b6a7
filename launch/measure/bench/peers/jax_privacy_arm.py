"""The arm of jax_privacy's `clipped_grad`."""

from __future__ import annotations

from typing import Any

import jax_privacy

from dpdist.mechanism.clipping import GradSum
from dpdist_launch.measure.bench.arms import JAX
from dpdist_launch.measure.bench.program import Arm, jax_program
from dpdist_launch.measure.bench.tasks import Problem


def jax_privacy_arm() -> Arm:
    """Return the arm; all settings are defaults, except that the loss takes one example without a batch axis."""
    return Arm(
        name="jax_privacy",
        framework=JAX,
        private=True,
        prepare=lambda problem: jax_program(_grad_sum(problem), problem),
    )


def _grad_sum(problem: Problem) -> GradSum:
    clipped = jax_privacy.clipped_grad(
        problem.loss, l2_clip_norm=problem.clip_norm, keep_batch_dim=False, return_grad_norms=True
    )

    def grad_sum(params: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
        sums, found = clipped(params, batch, is_padding_example=mask == 0)
        return sums, found.grad_norms

    return grad_sum
