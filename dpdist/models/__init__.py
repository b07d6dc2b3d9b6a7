"""Models: each is three pure functions (init, apply, loss) of *one* example.

A function of one example cannot mix examples, and per-example clipping needs exactly that. Batch normalisation, for
instance, cannot be written here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.config.lora import ATTENTION
from dpdist.config.lora import read as read_lora
from dpdist.config.plugins import load_function
from dpdist.config.user_errors import users_code
from dpdist.errors import InputError
from dpdist.models.tasks import Task, cross_entropy, task_of

__all__ = ["Model", "Task", "build", "cross_entropy", "example_loss"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as pure functions.

    Attributes:
        init: `init(key) -> params`, a pytree of floating-point arrays.
        apply: `apply(params, example) -> logits` of one example, a dict of arrays without a batch axis. Integer images
            are scaled in here, on the device. A randomised model finds a PRNG key in `example["key"]` in training, and
            no such entry in evaluation.
        loss: `loss(outputs, example) -> scalar`; by default that of `model.task`.
        randomised: if True, every training example gets its own key, derived from (secret, step, index), so that
            dropout and augmentation do not depend on the number of devices.
    """

    init: Callable[[Array], Any]
    apply: Callable[[Any, dict[str, Array]], Array]
    loss: Callable[[Array, Mapping[str, Array]], Array] | None = None
    randomised: bool = False


def build(config: config_module.Model, *, example: dict[str, jax.ShapeDtypeStruct], classes: int | None) -> Model:
    """Build the model that a config names, with its loss set.

    Args:
        config: the `model` section. The model's function is called with `config.options` and, if it has parameters of
            these names, with `example` and `classes`.
        example: shapes and dtypes of one example, by column.
        classes: the data source's number of classes, or None; `config.classes` takes precedence. The model is given
            the number of outputs that the task makes of it, such as 1 for `binary`.

    Raises:
        InputError: there is no such model, task or loss, the model does not accept the options, it needs a number of
            classes and none is given, or it does not return a `Model`.
    """
    from dpdist.models.bert import bert
    from dpdist.models.families import family_of, settled
    from dpdist.models.frozen import with_frozen_in
    from dpdist.models.gpt2 import gpt2
    from dpdist.models.llama import llama
    from dpdist.models.lora import with_lora
    from dpdist.models.resnet import bit_resnet
    from dpdist.models.small import cnn, mlp
    from dpdist.models.vit import vit

    builtin: dict[str, Callable[..., Model]] = {
        "mlp": mlp,
        "cnn": cnn,
        "vit": vit,
        "bit_resnet": bit_resnet,
        "bert": bert,
        "gpt2": gpt2,
        "llama": llama,
    }
    task = task_of(config)
    build_fn = builtin.get(config.name) or load_function(config.name, "model.name", list(builtin))
    if isinstance(build_fn, type) and not issubclass(build_fn, Model):
        remedy = (
            "is a class; name a function that returns a dpdist.models.Model, as dpdist.models.nnx_model.from_nnx does."
        )
        raise InputError("model.name", config.name, remedy)
    options = dict(settled(config).options)
    parameters = inspect.signature(build_fn).parameters
    for name, value in (("example", example), ("classes", task.width(example, config.classes or classes))):
        if name in parameters and name not in options:
            if value is None:
                if config.loss is None:
                    task.check(
                        example, jax.ShapeDtypeStruct((2,), jnp.float32), "train"
                    )  # there may be no label at all
                raise InputError("model.classes", None, "the data source does not say; set model.classes.")
            options[name] = value
    unknown = [name for name in options if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise InputError(
            f"model.options.{unknown[0]}",
            options[unknown[0]],
            f"{config.name} takes {', '.join(n for n in parameters if n != 'example')}.",
        )
    if config.name in builtin:
        for name in _SIZES & options.keys():
            if isinstance(options[name], int) and options[name] < 1:
                raise InputError(f"model.options.{name}", options[name], "give at least 1.")
    try:
        with users_code("model.name", config.name):
            model = build_fn(**options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        if config.name not in builtin:
            raise  # what it says may quote data
        raise InputError("model.options", config.options, f"{config.name} refused them: {error}") from error
    if not isinstance(model, Model):
        raise InputError("model.name", config.name, f"must return a dpdist.models.Model, not {type(model).__name__}.")
    if config.lora is not None:
        family = family_of(config.name)
        model = with_lora(model, read_lora(config.lora, ATTENTION if family is None else family.adapted))
    if config.frozen_dtype != "float32":
        model = with_frozen_in(model, config.frozen_dtype, config)
    return dataclasses.replace(model, loss=_loss(config, task, model))


#: Options of built-in models that are numbers of something.
_SIZES = {
    *("width", "depth", "heads", "kv_heads", "head_width", "mlp", "patch", "image_size", "vocabulary", "positions"),
}


def _loss(config: config_module.Model, task: Task, model: Model) -> Callable[..., Array]:
    if config.loss == "cross_entropy" and task.loss is cross_entropy:
        return model.loss or cross_entropy
    if config.loss is not None:
        return load_function(config.loss, "model.loss", ["cross_entropy"])
    loss = model.loss or task.loss
    if loss is None:
        raise InputError("model.loss", None, f"the task {task.name} has none; give module:function of your own.")
    return loss


def example_loss(model: Model) -> Callable[[Any, dict[str, Array]], Array]:
    """Return `f(params, example) -> scalar`, the function whose per-example gradients are clipped."""
    if model.loss is None:
        raise ValueError("the model has no loss: take it from `build`, which gives it that of the task")
    loss = model.loss
    return lambda params, example: loss(model.apply(params, example), example)
