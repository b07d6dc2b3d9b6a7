"""Build the optimizer that a config names. It only ever sees the noisy mean gradient, so what it does is free.

That holds for a pure function of gradients, state and parameters, which an optax `GradientTransformation` is. One that
reads data by other ways, such as a callback or a constant made of records, would void the guarantee; callbacks are
refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpdist.config import Optimizer
from dpdist.config.nearest import did_you_mean
from dpdist.config.plugins import load_function
from dpdist.config.user_errors import users_code
from dpdist.errors import InputError

_OPTAX = "optax."
#: Parameters of optax's schedules that are a number of steps, which is that of the run unless it is given.
_LENGTHS = ("decay_steps", "transition_steps")


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Return the optimizer with its learning-rate schedule over `steps` steps.

    Raises:
        InputError: there is no such optimizer or schedule, it takes other options, it is no optax transformation, or it
            needs more than gradients, state and parameters.
    """
    if config.name not in ("sgd", "adam", "adamw"):
        return _named_optimizer(config, steps)
    rate = _schedule(config, steps)
    if config.name == "sgd":
        made = optax.sgd(rate, momentum=config.momentum or None)
    elif config.name == "adam":
        made = optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        made = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    if _is_path(config.schedule):
        _require_pure(made, config.schedule, "optimizer.schedule")
    return made


def _is_path(name: str) -> bool:
    return "." in name or ":" in name


def _named_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    function, options = _function(config.name, "optimizer.name"), dict(config.options)
    if "learning_rate" in inspect.signature(function).parameters:
        if "learning_rate" in options:
            raise InputError("optimizer.options", options, "give the learning rate as optimizer.learning_rate.")
        options["learning_rate"] = _schedule(config, steps)
    elif config.learning_rate is not None or config.schedule != "constant":
        raise InputError(
            "optimizer.learning_rate", config.learning_rate, f"{config.name} takes none; leave it and the schedule out."
        )
    made = _call(function, config.name, options, "optimizer.name", "optimizer.options")
    if not isinstance(made, optax.GradientTransformation):
        given = type(made).__name__
        raise InputError(
            "optimizer.name", config.name, f"returned a {given}; an optimizer is an optax.GradientTransformation."
        )
    _require_pure(made, config.name, "optimizer.name")
    return made


def _function(path: str, field: str) -> Callable[..., Any]:
    """`optax.NAME`, also of a module within, or `module:function`."""
    if not path.startswith(_OPTAX):
        return load_function(path, field, [])
    found: Any = optax
    for name in path.removeprefix(_OPTAX).split("."):
        there = [each for each in dir(found) if not each.startswith("_")]
        found = getattr(found, name, None)
        if found is None:
            raise InputError(field, path, f"{did_you_mean(name, there)}optax {optax.__version__} has no {path}.")
    if not callable(found):
        raise InputError(field, path, "is no function.")
    return found


def _call(function: Callable[..., Any], path: str, options: dict[str, Any], field: str, options_field: str) -> Any:
    signature, given = inspect.signature(function), {k: v for k, v in options.items() if k != "learning_rate"}
    try:
        signature.bind(**options)
    except TypeError as error:
        names = [name for name in signature.parameters if name != "learning_rate"]
        meant = next((hint for name in options if name not in names and (hint := did_you_mean(name, names))), "")
        raise InputError(options_field, given, f"{error}; {meant}{path} takes {', '.join(names)}.") from None
    try:
        with users_code(field, path):
            return function(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError) or not path.startswith(_OPTAX):
            raise
        raise InputError(options_field, given, f"{path} refused them: {error}.") from None


def _schedule(config: Optimizer, steps: int) -> optax.Schedule:
    if _is_path(config.schedule):
        return _named_schedule(config, steps)
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    if peak is None:
        raise InputError("optimizer.learning_rate", None, f"{config.name} needs one; give it, such as 1e-3.")
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _named_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    field, path = "optimizer.schedule", config.schedule
    function, options = _function(path, field), dict(config.schedule_options)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _LENGTHS and parameter.default is parameter.empty:
            options.setdefault(name, steps)
    made = _call(function, path, options, field, "optimizer.schedule_options")
    with users_code(field, path):
        rates = [np.asarray(jax.jit(made)(jnp.int32(step))) for step in (0, steps - 1)] if callable(made) else []
    if not rates or any(rate.shape != () or not np.isfinite(rate) for rate in rates):
        raise InputError(field, path, "is no schedule: a schedule takes a step and returns one finite learning rate.")
    return made


def _require_pure(optimizer: optax.GradientTransformation, path: str, field: str) -> None:
    """Try an optimizer on one parameter, without values.

    Raises:
        InputError: it needs more than gradients, state and parameters, calls back into Python, or gives no update for
            each parameter.
    """
    like = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}

    def once(gradients: Any, params: Any) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    try:
        with users_code(field, path):
            traced, updates = jax.make_jaxpr(once, return_shape=True)(like, like)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError) or not path.startswith(_OPTAX):
            raise
        needs = "it needs more than the noisy gradient, its state and the parameters, or options of another kind"
        remedy = f"cannot be used: {needs} ({error})."
        raise InputError(field, path, remedy) from None
    if any(word in str(traced) for word in ("callback", "ffi_call")):
        remedy = "calls back into Python, where it could read data; an optimizer must be a pure function of its inputs."
        raise InputError(field, path, remedy)
    if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, like):
        raise InputError(field, path, "gives no update of the shape of each parameter.")
