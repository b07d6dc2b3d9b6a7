"""From config and model to the gradient sum of a batch: which parameters train, how each gradient norm is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.cluster.agreement import decide
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.config.user_errors import users_code
from dpdist.errors import InputError
from dpdist.mechanism.clipping import (
    GradSum,
    LeafStrategy,
    Preference,
    UnsupportedLossError,
    clipped_grad_sum,
)
from dpdist.mechanism.clipping.graph import trace
from dpdist.mechanism.clipping.strategy import UNUSED, smaller, strategies_of
from dpdist.mechanism.ledger import Plan
from dpdist.models.frozen import frozen_paths
from dpdist.program.cache import examples_at_a_time, few_at_a_time
from dpdist.program.device_rates import device_rates, faster, has_tensor_cores
from dpdist.program.diagnosis import naming_the_fault
from dpdist.program.plain_gradients import plain_grad_sum


@dataclass(frozen=True, kw_only=True)
class ExampleLoss:
    """The loss of one training example, and shapes for its arguments."""

    #: `loss_fn(params, example) -> scalar`.
    loss_fn: Callable[..., Any]
    #: A pytree of arrays, or of their shapes.
    params: Any
    #: Shapes and dtypes by column, the key of a randomised loss included.
    example: Any


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradient sum of a run, and the decisions behind it."""

    grad_sum: GradSum
    #: Paths of the parameters that do not train.
    frozen: frozenset[str]
    #: `ghost` or `instantiate` by path; None where every gradient is instantiated, or nothing is clipped.
    strategies: dict[str, str] | None
    #: `highest` or `tensor`: see `clipped_grad_sum`.
    precision: str
    #: How many examples are computed at a time; None where the whole batch is.
    examples_at_a_time: int | None

    def of_batches(self, sizes: Collection[int]) -> GradSum:
        """The gradient sum of batches of these sizes."""
        return few_at_a_time(self.grad_sum, self.examples_at_a_time, sizes)


def precision_for(config: Config, world: World) -> str:
    """`highest` or `tensor`: what `training.precision` says, or what this job's devices are made for."""
    if config.training.precision != "auto":
        return config.training.precision
    return "tensor" if has_tensor_cores(world.mesh.devices.flat[0]) else "highest"


def choose_strategies(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    example: Any,
    *,
    method: str = "auto",
    prefer: Preference = smaller,
    strategies: Mapping[str, str] | None = None,
    frozen: Collection[str] = frozenset(),
) -> list[LeafStrategy]:
    """Return the strategy that `clipped_grad_sum` uses for each parameter that trains.

    Args:
        params: pytree of arrays or shapes.
        example: pytree of arrays or shapes of one example, without a batch axis.

    Raises:
        ValueError: a strategy is unknown or a pattern matches no parameter.
        UnsupportedLossError: the loss is not a scalar, or a parameter that trains is complex.
    """
    prefer = prefer if method == "auto" else smaller
    params, example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, example))
    chosen, _ = strategies_of(trace(loss_fn, params, example, frozen), params, prefer, strategies or {})
    return [leaf for leaf in chosen if leaf.path not in frozen]


def strategies_for(config: Config, loss: ExampleLoss, world: World) -> list[LeafStrategy]:
    """Choose how to compute the gradient norm of each parameter on this job's devices.

    Raises:
        InputError: the loss cannot be clipped, or an override matches no parameter.
    """
    device = world.mesh.devices.flat[0]
    try:
        with users_code("model.loss", config.model.loss or config.model.name):
            chosen = choose_strategies(
                loss.loss_fn,
                loss.params,
                loss.example,
                method=config.training.clipping,
                prefer=faster(
                    device_rates(device.device_kind, device.platform), tensor=precision_for(config, world) == "tensor"
                ),
                strategies=config.training.clipping_strategies,
                frozen=frozen_paths(config.model, loss.params),
            )
        if chosen and all(leaf.reason == UNUSED for leaf in chosen):
            remedy = "depends on no parameter that trains, so the run would train on noise alone; mend the loss."
            raise InputError("model.loss", config.model.loss or config.model.name, remedy)
        idle = [leaf.path for leaf in chosen if leaf.reason == UNUSED and leaf.path.endswith(("lora_a", "lora_b"))]
        if idle and config.model.lora is not None:
            remedy = (
                "has an adapter that would learn noise alone: the model never calls this layer, though it may read "
            )
            remedy += "its kernel; leave it out."
            raise InputError("model.lora.targets", f"{idle[0].rpartition('/')[0]}/kernel", remedy)
        return chosen
    except InputError:
        raise
    except UnsupportedLossError as error:
        raise InputError("model.loss", config.model.loss, f"{error}.") from None
    except ValueError as error:
        raise InputError("training.clipping_strategies", config.training.clipping_strategies, f"{error}.") from None


def build_gradients(
    config: Config, plan: Plan, loss: ExampleLoss, world: World, earlier: dict[str, Any] | None
) -> Gradients:
    """The gradient sum that `config` asks for; process 0 chooses the strategies for all.

    Args:
        earlier: the decisions of an earlier part of the run, which are kept, so that resuming is exact.

    Raises:
        InputError: as `strategies_for`; or one example's loss could see another example.
    """
    frozen = frozen_paths(config.model, loss.params)
    if plan.privacy is None:
        plain = plain_grad_sum(loss.loss_fn, frozen=frozen)
        _require_supported(plain, loss, config, frozen, world)
        examples = examples_at_a_time(loss.loss_fn, loss.params, loss.example, world.platform)
        return Gradients(
            grad_sum=plain, frozen=frozen, strategies=None, precision="highest", examples_at_a_time=examples
        )
    method, strategies = config.training.clipping, None
    precision = earlier["precision"] if earlier is not None else decide(world, lambda: precision_for(config, world))
    if method != "per_example":

        def choose() -> dict[str, str]:
            return {leaf.path: leaf.strategy for leaf in strategies_for(config, loss, world)}

        strategies = earlier["clipping"] if earlier is not None else decide(world, choose)
    grad_sum = clipped_grad_sum(
        loss.loss_fn,
        clip_norm=plan.privacy.clip_norm,
        method=method,
        precision=precision,
        strategies=strategies,
        frozen=frozen,
    )
    _require_supported(grad_sum, loss, config, frozen, world)
    examples = examples_at_a_time(loss.loss_fn, loss.params, loss.example, world.platform)
    return Gradients(
        grad_sum=grad_sum, frozen=frozen, strategies=strategies, precision=precision, examples_at_a_time=examples
    )


def _require_supported(
    grad_sum: GradSum, loss: ExampleLoss, config: Config, frozen: frozenset[str], world: World
) -> None:
    """Trace the gradient sum of one example, outside the mesh and before anything is compiled; on process 0, for all.

    Raises:
        InputError: the loss is refused, by whatever method.
    """
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), loss.example)

    def traced() -> None:
        try:
            users = users_code("model.loss", config.model.loss or config.model.name)
            with users, naming_the_fault(loss.loss_fn, loss.params, batch, frozen):
                jax.eval_shape(grad_sum, loss.params, batch, jax.ShapeDtypeStruct((1,), jnp.float32))
        except UnsupportedLossError as error:
            raise InputError("training.clipping", config.training.clipping, f"{error}.") from None

    decide(world, traced, timeout=config.cluster.initialization_timeout)
