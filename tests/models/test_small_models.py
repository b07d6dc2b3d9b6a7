"""Models as functions of one example; one that cannot be used is refused with the config field's name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpdist import config, models
from dpdist.errors import InputError
from dpdist.models.small import ACTIVATIONS, from_nnx

FASHION = {"image": jax.ShapeDtypeStruct((28, 28, 1), jnp.uint8), "label": jax.ShapeDtypeStruct((), jnp.int32)}


def build(
    name: str,
    *,
    example: dict[str, Any] = FASHION,
    classes: int | None = 10,
    loss: str = "cross_entropy",
    **options: Any,
) -> models.Model:
    return models.build(config.Model(name=name, options=options, loss=loss), example=example, classes=classes)


def one(example: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(random.integers(0, 256, example["image"].shape), example["image"].dtype),
        "label": jnp.int32(random.integers(0, 10)),
    }


def shapes(model: models.Model) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def some_params(model: models.Model) -> Any:
    """Return parameters of the right shapes, faster than by compiling an initialiser."""
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: (random.normal(size=x.shape) / np.sqrt(x.shape[0])).astype(x.dtype), shapes(model))


def size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_cnn_is_that_of_the_literature() -> None:
    assert size(shapes(build("cnn"))) == 26_010


@pytest.mark.parametrize(
    ("hidden", "expected"), [((64,), 784 * 64 + 64 + 650), ((), 7850), ([8, 9], 785 * 8 + 81 + 100)]
)
def test_the_mlp_has_the_layers_asked_for(hidden: Any, expected: int) -> None:
    assert size(shapes(build("mlp", hidden=hidden))) == expected


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_one_example_gives_one_finite_loss_and_gradient(name: str) -> None:
    model = build(name)
    params = some_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert jax.eval_shape(model.apply, params, one(FASHION)).shape == (10,)
    loss, gradient = jax.jit(jax.value_and_grad(models.example_loss(model)))(params, one(FASHION))
    assert loss.shape == ()
    assert 0.01 < loss < 20
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_same_key_gives_the_same_parameters_and_another_others() -> None:
    model = build("mlp", hidden=())
    a, b, c = (np.asarray(model.init(jax.random.key(seed))["layers"][0]["kernel"]) for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert abs(a.std() * 28 - 1) < 0.1  # LeCun's scale


@pytest.mark.parametrize(("name", "dtype"), [("mlp", np.uint8), ("mlp", np.float32), ("cnn", np.uint8)])
def test_images_are_shifted_and_scaled_by_public_constants(name: str, dtype: Any) -> None:
    example = one(FASHION)
    example["image"] = example["image"].astype(dtype)
    model, plain = build(name, offset=100.0, scale=16.0), build(name, offset=0.0, scale=1.0)
    params = some_params(model)
    by_hand = example | {"image": (example["image"].astype(jnp.float32) - 100) / 16}
    assert np.allclose(jax.jit(model.apply)(params, example), jax.jit(plain.apply)(params, by_hand), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_only_bytes_are_divided_by_255_unless_a_scale_is_given(name: str) -> None:
    example = one(FASHION)
    floats = example | {"image": example["image"].astype(np.float32)}
    spec = FASHION | {"image": jax.ShapeDtypeStruct(example["image"].shape, np.float32)}
    model, for_floats = build(name), build(name, example=spec)
    params = some_params(model)
    scaled = floats | {"image": floats["image"] / 255}
    assert np.allclose(model.apply(params, example), for_floats.apply(params, scaled), atol=1e-5)
    assert not np.allclose(model.apply(params, example), for_floats.apply(params, floats), atol=1e-2)


def test_an_mlp_takes_a_table_of_features_and_names_what_it_lacks() -> None:
    spec = {"features": jax.ShapeDtypeStruct((3,), np.float32), "label": jax.ShapeDtypeStruct((), np.int32)}
    model = build("mlp", example=spec, hidden=())
    example = {"features": np.array([0.5, -1, 2], np.float32), "label": np.int32(1)}
    params = some_params(model)
    by_hand = example["features"] @ params["layers"][0]["kernel"] + params["layers"][0]["bias"]
    assert np.allclose(model.apply(params, example), by_hand, atol=1e-5)
    for name, needs in (("mlp", "'image' or 'features'"), ("cnn", "'image'")):
        with pytest.raises(InputError, match=f"needs a column {needs}; there are label"):
            build(name, example={"label": spec["label"]})


def test_every_activation_is_used() -> None:
    params = some_params(build("mlp"))
    logits = {
        name: tuple(np.asarray(build("mlp", activation=name).apply(params, one(FASHION))).tolist())
        for name in ACTIVATIONS
    }
    assert len(set(logits.values())) == len(ACTIVATIONS)


# What cannot be used


class WithBatchNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.dense(x))


class WithLayerNorm(WithBatchNorm):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)


def test_batch_normalisation_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"BatchStat.*batch statistics, which mix examples"):
        from_nnx(WithBatchNorm, lambda e: e["image"])


def test_layer_normalisation_is_welcome() -> None:
    model = from_nnx(WithLayerNorm, lambda e: e["image"])
    assert size(shapes(model)) == 16 + 4 + 4 + 4


@pytest.mark.parametrize(
    ("name", "options", "field", "message"),
    [
        ("mlp", {"depth": 3}, "model.options.depth", "hidden"),
        ("cnn", {"hidden": [3]}, "model.options.hidden", "activation"),
        ("mlp", {"activation": "sigmoidal"}, "model.options", "tanh"),
        ("cnn", {"activation": "sigmoidal"}, "model.options", "tanh"),
        ("mlp", {"activation": 3}, "model.options", "tanh"),
        ("mlp", {"hidden": 5}, "model.options", "mlp"),
        ("mlp", {"hidden": ["wide"]}, "model.options", "mlp"),
        ("mlp", {"hidden": [-1]}, "model.options", "mlp"),
        ("resnet", {}, "model.name", "mlp, cnn"),
        ("no_such_module_x:build", {}, "model.name", "no_such_module_x"),
        ("math:no_such_function", {}, "model.name", "no_such_function"),
        ("math:", {}, "model.name", "module:function"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(name: str, options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build(name, **options)
    assert caught.value.field == field
    assert message in str(caught.value)


def test_too_small_an_image_for_the_cnn_is_refused() -> None:
    example = FASHION | {"image": jax.ShapeDtypeStruct((8, 8, 1), jnp.uint8)}
    with pytest.raises(InputError, match="14x14") as caught:
        build("cnn", example=example)
    assert caught.value.field == "model.options"


def test_unknown_classes_are_asked_for() -> None:
    with pytest.raises(InputError) as caught:
        build("mlp", classes=None)
    assert caught.value.field == "model.classes"
    with pytest.raises(InputError, match="add a column named 'label'"):  # which would be asked for next
        models.build(config.Model(name="mlp"), example={"image": FASHION["image"]}, classes=None)
    given = models.build(config.Model(name="mlp", classes=3), example=FASHION, classes=None)
    assert shapes(given)["layers"][1]["bias"].shape == (3,)


def test_a_missing_loss_is_named() -> None:
    with pytest.raises(InputError) as caught:
        build("mlp", loss="hinge")
    assert caught.value.field == "model.loss"
    assert "cross_entropy" in str(caught.value)


# A user's own model


OWN = """
import jax.numpy as jnp
from dpdist.models import Model


def linear(*, example, classes, gain=1.0):
    width = example["image"].shape[0]
    return Model(init=lambda key: {"w": jnp.ones((classes, width))},
                 apply=lambda params, e: gain * params["w"] @ e["image"])


def with_a_loss_of_its_own():
    return Model(init=lambda key: {"w": jnp.ones(2)}, apply=lambda params, e: params["w"],
                 loss=lambda logits, e: 5.0 + 0 * logits.sum(), randomised=True)


def squared(logits, example):
    return jnp.sum((logits - example["label"]) ** 2)


def not_a_model():
    return {"init": None}


def strict(*, flavour):
    raise ValueError(f"no {flavour} today")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a user's module in the working directory, where Python would not look for it by itself."""
    (tmp_path / "users_own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield "users_own_model"
    sys.modules.pop("users_own_model", None)


FLAT = {"image": jax.ShapeDtypeStruct((3,), jnp.float32), "label": jax.ShapeDtypeStruct((), jnp.int32)}


@pytest.fixture
def example() -> dict[str, Any]:
    return {"image": jnp.array([1.0, 2, 3]), "label": jnp.int32(1)}


def test_a_model_of_the_users_own_is_built_from_its_path(own: str, example: dict[str, Any]) -> None:
    model = build(f"{own}:linear", example=FLAT, classes=4, gain=2.0)
    params = model.init(jax.random.key(0))
    assert params["w"].shape == (4, 3)
    assert np.allclose(model.apply(params, example), 12.0)
    assert np.allclose(models.example_loss(model)(params, example), np.log(4), atol=1e-6)


def test_a_loss_of_the_users_own_is_used(own: str, example: dict[str, Any]) -> None:
    model = build(f"{own}:linear", example=FLAT, classes=4, loss=f"{own}:squared")
    assert float(models.example_loss(model)(model.init(jax.random.key(0)), example)) == 4 * 25


def test_a_model_may_bring_its_loss_and_ask_for_randomness(own: str, example: dict[str, Any]) -> None:
    model = build(f"{own}:with_a_loss_of_its_own", example=FLAT, classes=None)
    assert float(models.example_loss(model)(model.init(jax.random.key(0)), example)) == 5
    assert model.randomised
    assert not build("mlp").randomised


def test_what_is_not_a_model_is_refused(own: str) -> None:
    with pytest.raises(InputError, match="Model, not dict") as caught:
        build(f"{own}:not_a_model")
    assert caught.value.field == "model.name"


def test_what_a_users_function_refuses_is_shown_by_its_place_as_its_text_may_quote_data(own: str) -> None:
    with pytest.raises(InputError, match=r"ValueError in .*users_own_model\.py, line \d+ ") as caught:
        build(f"{own}:strict", example=FLAT, flavour="vanilla")
    assert caught.value.field == "model.name"
    assert "no vanilla today" in str(caught.value.__cause__)  # which the private log has
    with pytest.raises(InputError) as caught:
        build(f"{own}:linear", example=FLAT, classes=4, gian=2.0)
    assert caught.value.field == "model.options.gian"
