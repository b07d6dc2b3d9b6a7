"""The benchmark's arms in JAX: plain SGD in three forms, every clipping method of dpdist, the paper's masked method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dpdist.mechanism.clipping import GradSum, clipped_grad_sum
from dpdist.program.cache import examples_at_a_time, few_at_a_time
from dpdist.program.device_rates import device_rates, faster
from dpdist.program.plain_gradients import plain_grad_sum
from dpdist_launch.measure.bench.program import Arm, jax_program
from dpdist_launch.measure.bench.tasks import Problem

JAX = "jax"
SGD, TENSOR, MASKED, NAIVE = "sgd", "tensor", "jax-masked", "naive"
SGD_BATCH, SGD_LOOP = "sgd batch", "sgd loop"
#: Ratios are to the fastest of these that is measured.
PLAIN = (SGD, SGD_BATCH, SGD_LOOP)
#: Every arm that `--methods` can name, with its description.
ARMS = {
    SGD: "plain SGD as training computes it: one backward pass over the summed losses; on a CPU, without convolutions, "
    "a few examples at a time",
    SGD_BATCH: "plain SGD: the same, always of the whole batch at once",
    SGD_LOOP: "plain SGD: a loop over single examples, `lax.scan` of `grad`",
    "auto": "dpdist, each parameter's norm in the way that is faster on the machine",
    TENSOR: "dpdist as `auto`, norms and sums from bfloat16 or TF32 factors on tensor cores",
    "bookkeeping": "dpdist, one forward and one backward pass, each norm in the way that needs less memory",
    "ghost": "dpdist, the same with two backward passes and less kept between them",
    "per_example": "dpdist's reference: `vmap` of `grad`, then one product with the clip factors",
    MASKED: "the paper's JAX method, written anew: every gradient scaled by clip factor and mask, then summed",
    NAIVE: "Poisson batches of varying size through `per_example`: every new size compiles. The mean of a short "
    "series, compilation included",
}


def jax_arm(name: str) -> Arm:
    """Return an arm of `ARMS` by name; not `naive`, which has no single program to run repeatedly."""
    return Arm(
        name=name,
        framework=JAX,
        private=name not in PLAIN,
        prepare=lambda problem: jax_program(grad_sum(name, problem), problem),
    )


def grad_sum(name: str, problem: Problem, *, device: Any = None) -> GradSum:
    """Return the arm's `f(params, batch, mask) -> (sums, norms)`; see `clipped_grad_sum`.

    Args:
        problem: its arrays may be shapes.
        device: what it is to run on; None means JAX's default.
    """
    if name == MASKED:
        return masked_grad_sum(problem.loss, clip_norm=problem.clip_norm)
    if name == SGD_BATCH:
        return plain_grad_sum(problem.loss)
    if name == SGD_LOOP:
        return looped_grad_sum(problem.loss)
    device = device or jax.devices()[0]
    example = jax.tree.map(lambda column: jax.ShapeDtypeStruct(column.shape[1:], column.dtype), problem.batch)
    examples = examples_at_a_time(problem.loss, problem.params, example, device.platform)  # as training does
    if name == SGD:
        return few_at_a_time(plain_grad_sum(problem.loss), examples, [problem.size])
    prefer = faster(device_rates(device.device_kind, device.platform), tensor=name == TENSOR)  # as training chooses
    method, precision = {TENSOR: ("auto", "tensor"), NAIVE: ("per_example", "highest")}.get(name, (name, "highest"))
    clipped = clipped_grad_sum(
        problem.loss, clip_norm=problem.clip_norm, method=method, precision=precision, prefer=prefer
    )
    return clipped if name == NAIVE else few_at_a_time(clipped, examples, [problem.size])


def looped_grad_sum(loss_fn: Callable[[Any, Any], Array]) -> GradSum:
    """Make the plain gradient sum that takes one example after the other, so that the sum is all that is stored."""

    def summed(params: Any, batch: Any, mask: Float[Array, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        def add(sums: Any, row: tuple[Any, Array]) -> tuple[Any, None]:
            example, used = row
            gradient = jax.grad(loss_fn)(params, example)
            return jax.tree.map(lambda total, leaf: total + jnp.where(used > 0, leaf, 0), sums, gradient), None

        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batch, mask))
        return sums, jnp.zeros_like(mask)

    return summed


def masked_grad_sum(loss_fn: Callable[[Any, Any], Array], *, clip_norm: float) -> GradSum:
    """Make the method of arXiv 2406.17298: fixed batch size, all per-example gradients, and a mask for the padding.

    We wrote it from the formula, sum_i mask_i min(1, C / |g_i|) g_i, in the paper's order: clipped gradients first,
    then the masked sum. It is one program, so XLA may fuse its parts.
    """

    def clipped_sum(params: Any, batch: Any, mask: Float[Array, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        def clipped_gradient(example: Any) -> tuple[Any, Array]:
            gradient = jax.grad(loss_fn)(params, example)
            norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))
            factor = jnp.minimum(1.0, clip_norm / norm)
            return jax.tree.map(lambda leaf: factor * leaf, gradient), norm

        gradients, norms = jax.vmap(clipped_gradient)(batch)
        masked = jax.vmap(lambda weight, gradient: jax.tree.map(lambda leaf: weight * leaf, gradient))(mask, gradients)
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), masked), norms

    return clipped_sum
