"""What of `model.lora` is refused: settings, ranks, and kernels beside which no adapter can be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from dpdist import config, models
from dpdist.config.lora import Lora, read
from dpdist.errors import InputError
from dpdist.models import Model
from dpdist.models.lora import require_rank, with_lora
from dpdist.models.nnx_model import from_nnx


@pytest.mark.parametrize(
    ("lora", "field", "message"),
    [
        ({}, "rank", "give a whole number of at least 1"),
        ({"rank": 0}, "rank", "give a whole number"),
        ({"rank": 2.0}, "rank", "give a whole number"),
        ({"rank": True}, "rank", "give a whole number"),
        ({"rank": 2, "alpha": 0}, "alpha", "give a positive, finite number"),
        ({"rank": 2, "alpha": float("nan")}, "alpha", "give a positive, finite number"),
        ({"rank": 2, "targets": "*"}, "targets", "give a list of patterns"),
        ({"rank": 2, "targets": []}, "targets", "give a list of patterns"),
        ({"rank": 2, "target": ["*"]}, "target", "did you mean.*there are rank, alpha, targets"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(lora: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config.Model(lora=lora)
    assert caught.value.field == f"model.lora.{field}"


IMAGES = {"image": jax.ShapeDtypeStruct((28, 28, 3), np.uint8)}


def example_of(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    if name in ("cnn", "bit_resnet"):
        return IMAGES
    return {c: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for c, rows in tiny.columns(name).items()}


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "gpt2",
            ["*/query/kernel"],
            r"matches no kernel; .* beside layers/\*/attention/out/kernel, layers/\*",
        ),
        ("gpt2", ["words"], "matches words, which is no layer's kernel; name others: "),
        ("bit_resnet", ["norm/*"], "matches norm/group/bias, which is no layer's kernel; name others: "),
        (
            "bit_resnet",
            ["*attention/*/kernel"],
            r"matches no kernel; .* head/kernel, stages/\*/\*/conv1/kernel,",
        ),
        ("cnn", None, "matches no kernel; name others: .* conv1/kernel, conv2/kernel, dense/kernel, head/kernel"),
    ],
)
def test_targets_that_take_no_adapter_are_refused(name: str, targets: list[str] | None, message: str) -> None:
    lora = {"rank": 2} | ({"targets": targets} if targets else {})
    with pytest.raises(InputError, match=message) as caught:
        models.build(
            config.Model(name=name, options=tiny.OPTIONS.get(name, {}), lora=lora), example=example_of(name), classes=5
        )
    assert caught.value.field == "model.lora.targets"


class Beside(nnx.Module):
    """A layer, and another that takes adapters."""

    def __init__(self, make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> None:
        self.odd = make(rngs)
        self.plain = nnx.Conv(4, 4, (3, 3), rngs=rngs)


class OwnConv(nnx.Conv):
    """It may compute anything."""


def stacked(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))(rngs)


def own_products(*inputs: Any, **settings: Any) -> jax.Array:
    return jax.lax.dot_general(*inputs, **settings)


def own_convolution(*inputs: Any, **settings: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(*inputs, **settings)


MASK = np.ones((3, 3, 4, 4), np.float32)
ODD: dict[str, tuple[Callable[[nnx.Rngs], Any], str]] = {
    "grouped": (lambda rngs: nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs), "has feature_group_count 2"),
    "masked": (lambda rngs: nnx.Conv(4, 4, (3, 3), mask=jnp.asarray(MASK), rngs=rngs), "whose layer has a mask"),
    "own convolution": (
        lambda rngs: nnx.Conv(4, 4, (3, 3), conv_general_dilated=own_convolution, rngs=rngs),
        "has a conv_general_dilated of its own",
    ),
    "own promotion": (
        lambda rngs: nnx.Conv(4, 4, (3, 3), promote_dtype=lambda arrays, **_: arrays, rngs=rngs),
        "has a promote_dtype of its own",
    ),
    "own product": (lambda rngs: nnx.Linear(4, 4, dot_general=own_products, rngs=rngs), "has a dot_general of its own"),
    "subclass": (lambda rngs: OwnConv(4, 4, (3, 3), rngs=rngs), "is of OwnConv, no nnx.Linear or nnx.Conv"),
    "transposed": (lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), rngs=rngs), "is of ConvTranspose, no nnx.Linear"),
    "stacked": (stacked, r"which holds several layers, as \[3, 4, 4\]"),
    "tuple": (lambda rngs: nnx.data((nnx.Linear(4, 4, rngs=rngs),)), "in a tuple, where nothing can take its place"),
    "normed": (
        lambda rngs: nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), use_scale=False, rngs=rngs),
        "which nnx.WeightNorm changes before its use",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_kernel_beside_which_an_adapter_would_be_wrong_is_refused_by_name(kind: str) -> None:
    make, message = ODD[kind]
    model = from_nnx(lambda rngs: Beside(make, rngs), lambda e: e["x"])
    with pytest.raises(
        InputError, match=rf"matches odd/.*kernel, .*{message}.*name others: .*beside plain/kernel\."
    ) as caught:
        with_lora(model, read({"rank": 1, "targets": ["*kernel"]}))
    assert caught.value.field == "model.lora.targets"
    without = with_lora(model, read({"rank": 1, "targets": ["plain/*"]}))  # a pattern that misses it is no error
    assert "lora_a" in jax.eval_shape(without.init, jax.random.key(0))["plain"]


def test_a_model_in_which_nothing_takes_adapters_says_so() -> None:
    model = from_nnx(lambda rngs: nnx.Sequential(OwnConv(4, 4, (3, 3), rngs=rngs)), lambda e: e["x"])
    with pytest.raises(InputError, match=r"no layer of this model takes adapters; leave model\.lora out and train"):
        with_lora(model, read({"rank": 1, "targets": ["*kernel"]}))


@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (lambda rngs: nnx.Linear(6, 4, rngs=rngs), 4),
        (lambda rngs: nnx.Linear(4, 6, rngs=rngs), 4),
        (lambda rngs: nnx.Conv(2, 30, (3, 3), rngs=rngs), 18),
        (lambda rngs: nnx.Conv(2, 7, (3, 3), rngs=rngs), 7),
    ],
)
def test_a_rank_of_which_the_factors_are_larger_than_the_kernel_is_refused(layer: Any, most: int) -> None:
    model = from_nnx(lambda rngs: nnx.Sequential(layer(rngs), nnx.Linear(40, 40, rngs=rngs)), lambda e: e["x"])
    with pytest.raises(InputError, match=rf"layers/0/kernel has .*; give at most {most}, or leave it out of") as caught:
        require_rank(*adapted(model, most + 1))
    assert (caught.value.field, caught.value.value) == ("model.lora.rank", most + 1)
    require_rank(*adapted(model, most))


def adapted(model: Any, rank: int) -> tuple[Model, Lora]:
    lora = read({"rank": rank, "targets": ["*kernel"]})
    return with_lora(model, lora), lora


Layer = Callable[[nnx.Rngs], Any]
LAYERS: dict[str, Layer] = {
    "linear": lambda rngs: nnx.Linear(3, 3, rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(3, 3, (3,), rngs=rngs),
}


def shared_kernel(layer: Layer, rngs: nnx.Rngs) -> nnx.Module:
    both = nnx.Sequential(layer(rngs), layer(rngs))
    both.layers[1].kernel = both.layers[0].kernel
    return both


def used_twice(layer: Layer, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(*[layer(rngs)] * 2)


def read_elsewhere(layer: Layer, rngs: nnx.Rngs) -> nnx.Module:
    """As tied words: merged, the kernel would change where the adapter is not."""
    both = nnx.Sequential(layer(rngs))
    both.tied = both.layers[0].kernel
    return both


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", [shared_kernel, used_twice, read_elsewhere])
def test_a_kernel_that_is_used_in_several_places_is_refused(how: Any, kind: str) -> None:
    model = from_nnx(lambda rngs: how(LAYERS[kind], rngs), lambda e: e["x"])
    with pytest.raises(InputError, match="belongs to several layers") as caught:
        with_lora(model, read({"rank": 1, "targets": ["*kernel"]}))
    assert caught.value.field == "model.lora.targets"


def test_a_model_of_which_no_layer_is_known_is_refused() -> None:
    model = models.Model(init=lambda key: {"kernel": jnp.ones((3, 3))}, apply=lambda p, e: e["x"] @ p["kernel"])
    with pytest.raises(InputError, match=r"this model is not made by .*from_nnx"):
        with_lora(model, read({"rank": 1, "targets": ["*kernel"]}))
