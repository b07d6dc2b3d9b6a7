"""Models: each is three pure functions (init, apply, loss) of *one* example.

A function of one example cannot mix examples, and per-example clipping needs exactly that. Batch normalisation, for
instance, cannot be written here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.config.plugins import load_function
from dpdist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as pure functions.

    Attributes:
        init: `init(key) -> params`, a pytree of floating-point arrays.
        apply: `apply(params, example) -> logits` of one example, a dict of arrays without a batch axis. Integer images
            are scaled in here, on the device. A randomised model finds a PRNG key in `example["key"]` in training, and
            no such entry in evaluation.
        loss: `loss(logits, example) -> scalar`; by default the cross entropy with `example["label"]`.
        randomised: if True, every training example gets its own key, derived from (secret, step, index), so that
            dropout and augmentation do not depend on the number of devices.
    """

    init: Callable[[Array], Any]
    apply: Callable[[Any, dict[str, Array]], Array]
    loss: Callable[[Array, dict[str, Array]], Array] | None = None
    randomised: bool = False


def cross_entropy(logits: Array, example: dict[str, Array]) -> Array:
    """Return the softmax cross entropy of one example's logits [classes] with the integer `example["label"]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


def build(config: config_module.Model, *, example: dict[str, jax.ShapeDtypeStruct], classes: int | None) -> Model:
    """Build the model that a config names, with its loss set.

    Args:
        config: the `model` section. The model's function is called with `config.options` and, if it has parameters of
            these names, with `example` and `classes`.
        example: shapes and dtypes of one example, by column.
        classes: the data source's number of classes, or None; `config.classes` takes precedence.

    Raises:
        InputError: there is no such model, it does not accept the options, it needs a number of classes and none is
            given, or it does not return a `Model`.
    """
    from dpdist.models.bert import bert
    from dpdist.models.resnet import bit_resnet
    from dpdist.models.small import cnn, mlp
    from dpdist.models.vit import vit

    builtin: dict[str, Callable[..., Model]] = {
        "mlp": mlp,
        "cnn": cnn,
        "vit": vit,
        "bit_resnet": bit_resnet,
        "bert": bert,
    }
    build_fn = builtin.get(config.name) or load_function(config.name, "model.name", list(builtin))
    options = dict(config.options)
    parameters = inspect.signature(build_fn).parameters
    for name, value in (("example", example), ("classes", config.classes or classes)):
        if name in parameters and name not in options:
            if value is None:
                raise InputError("model.classes", None, "the data source does not say; set model.classes.")
            options[name] = value
    unknown = [name for name in options if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise InputError(
            f"model.options.{unknown[0]}",
            options[unknown[0]],
            f"{config.name} takes {', '.join(n for n in parameters if n != 'example')}.",
        )
    try:
        model = build_fn(**options)
    except (TypeError, ValueError) as error:
        raise InputError("model.options", config.options, f"{config.name} refused them: {error}") from error
    if not isinstance(model, Model):
        raise InputError("model.name", config.name, f"must return a dpdist.models.Model, not {type(model).__name__}.")
    if config.loss != "cross_entropy":
        loss = load_function(config.loss, "model.loss", ["cross_entropy"])
    else:
        loss = model.loss or cross_entropy
    return Model(init=model.init, apply=model.apply, loss=loss, randomised=model.randomised)


def example_loss(model: Model) -> Callable[[Any, dict[str, Array]], Array]:
    """Return `f(params, example) -> scalar`, the function whose per-example gradients are clipped."""
    loss = model.loss or cross_entropy
    return lambda params, example: loss(model.apply(params, example), example)
