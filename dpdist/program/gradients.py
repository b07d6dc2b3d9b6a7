"""From config and model to the gradient sum of a batch: which parameters train, and how each one's norm is had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpdist import config as config_module
from dpdist.cluster.agreement import decide
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.clipping import (
    GradSum,
    LeafStrategy,
    UnsupportedLossError,
    choose_strategies,
    clipped_grad_sum,
    matching,
    paths_of,
    plain_grad_sum,
)
from dpdist.mechanism.ledger import Plan
from dpdist.program.device_rates import device_rates


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradient sum of a run, and what was decided about it."""

    grad_sum: GradSum
    #: Paths of the parameters that do not train.
    frozen: frozenset[str]
    #: `ghost` or `instantiate` by path; None where every gradient is materialised, or nothing is clipped.
    strategies: dict[str, str] | None


def frozen_paths(model: config_module.Model, params: Any) -> frozenset[str]:
    """Paths of the parameters that `model.trainable` leaves out.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    try:
        return frozenset(paths_of(params)) - matching(params, model.trainable)
    except ValueError as error:
        raise InputError("model.trainable", model.trainable, f"{error}.") from None


def strategies_for(
    config: Config, loss_fn: Callable[..., Any], params: Any, example: Any, world: World
) -> list[LeafStrategy]:
    """How the norm of each parameter's gradient would be had on this job's devices.

    Raises:
        InputError: the loss cannot be clipped, or an override matches no parameter.
    """
    device = world.mesh.devices.flat[0]
    try:
        return choose_strategies(
            loss_fn,
            params,
            example,
            method=config.training.clipping,
            rates=device_rates(device.device_kind, device.platform),
            strategies=config.training.clipping_strategies,
            frozen=frozen_paths(config.model, params),
        )
    except UnsupportedLossError as error:
        raise InputError("model.loss", config.model.loss, f"{error}.") from None
    except ValueError as error:
        raise InputError("training.clipping_strategies", config.training.clipping_strategies, f"{error}.") from None


def build_gradients(
    config: Config,
    plan: Plan,
    loss_fn: Callable[..., Any],
    params: Any,
    example: Any,
    world: World,
    earlier: dict[str, Any] | None,
) -> Gradients:
    """The gradient sum that `config` asks for; process 0 decides how, for all.

    Args:
        example: shapes of one example, the key of a randomised loss included.
        earlier: the decisions of an earlier part of the run, which are kept, so that resuming is exact.

    Raises:
        InputError: as `strategies_for`.
    """
    frozen = frozen_paths(config.model, params)
    if plan.clip_norm is None:
        return Gradients(grad_sum=plain_grad_sum(loss_fn, frozen=frozen), frozen=frozen, strategies=None)
    method, strategies = config.training.clipping, None
    if method != "per_example":

        def choose() -> dict[str, str]:
            return {leaf.path: leaf.strategy for leaf in strategies_for(config, loss_fn, params, example, world)}

        strategies = earlier["clipping"] if earlier is not None else decide(world, choose)
    grad_sum = clipped_grad_sum(loss_fn, clip_norm=plan.clip_norm, method=method, strategies=strategies, frozen=frozen)
    return Gradients(grad_sum=grad_sum, frozen=frozen, strategies=strategies)
