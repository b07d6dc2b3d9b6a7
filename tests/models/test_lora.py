"""Adapters, and other ways to train a part of a model: exact clipping, frozen matrices in bfloat16, and merging."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from dpdist import config, models
from dpdist.config.lora import read
from dpdist.errors import InputError
from dpdist.mechanism.clipping import clipped_grad_sum, paths_of, trainable
from dpdist.models.frozen import frozen_paths
from dpdist.models.lora import merged
from dpdist.models.nnx_model import from_nnx

LORA = {"rank": 3, "alpha": 6}
NAMES = ["gpt2", "llama", "vit", "bert"]
MASK = np.array([1, 1, 0, 1], np.float32)
PATTERNS = {
    "gpt2": {"bias-only": ["*/bias"], "last block": ["layers/1/*", "norm/*"]},
    "llama": {"bias-only": ["*/scale"], "last block": ["layers/1/*", "norm/*"]},
    "vit": {"bias-only": ["*/bias", "head/*"], "last block": ["layers/1/*", "norm/*", "head/*"]},
    "bert": {"bias-only": ["*/bias", "head/*"], "last block": ["layers/1/*", "pooler/*", "head/*"]},
}


def example_of(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {c: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for c, rows in tiny.columns(name).items()}


def section(name: str, **settings: Any) -> config.Model:
    options = tiny.OPTIONS[name] | {"pretrained": str(tiny.GOLDEN / f"{name}.safetensors")}
    return config.Model(name=name, options=options, **settings)


@cache
def adapted(name: str) -> tuple[models.Model, Any, frozenset[str]]:
    """The tiny model with adapters, all of whose parameters matter, and the paths of the frozen ones."""
    chosen = section(name, lora=LORA)
    model = models.build(chosen, example=example_of(name), classes=tiny.CLASSES)
    params = model.init(jax.random.key(0))
    shaken = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape) if path[-1].key == "lora_b" else x, params
    )
    return model, shaken, frozen_paths(chosen, params)


def batch_of(name: str) -> dict[str, np.ndarray]:
    return tiny.columns(name) | {"label": np.array([0, 3, 1, 4], np.int32)}


def by_hand(loss_fn: Any, params: Any, batch: Any, frozen: frozenset[str]) -> tuple[float, list[np.ndarray]]:
    """A norm that clips about half of the examples, and the clipped sums of `vmap(grad)`."""
    gradients = trainable(jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch), frozen)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
    norms = np.sqrt(sum(np.square(leaf).reshape(4, -1).sum(1) for leaf in leaves))
    clip_norm = float(np.median(norms[MASK > 0]))
    weights = MASK * np.minimum(1, clip_norm / np.maximum(norms, 1e-30))
    return clip_norm, [np.tensordot(weights, leaf, 1) for leaf in leaves]


def assert_exact(model: models.Model, params: Any, frozen: frozenset[str], name: str, method: str) -> None:
    loss_fn, batch = models.example_loss(model), batch_of(name)
    clip_norm, expected = by_hand(loss_fn, params, batch, frozen)
    grad_sum = clipped_grad_sum(loss_fn, clip_norm=clip_norm, method=method, frozen=frozen)
    sums, _ = jax.jit(grad_sum)(params, batch, MASK)
    found = jax.tree.leaves(sums)
    assert len(found) == len(expected)
    error = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(found, expected, strict=True)))
    assert error <= 3e-5 * np.sqrt(sum(np.square(b).sum() for b in expected))


@pytest.mark.parametrize("method", ["per_example", "bookkeeping", "ghost", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_clipped_sums_of_adapters_are_those_of_vmap(name: str, method: str) -> None:
    model, params, frozen = adapted(name)
    trained = set(paths_of(params)) - frozen
    assert {path.split("/")[-1] for path in trained if not path.startswith("head/")} == {"lora_a", "lora_b"}
    assert any(path.startswith("head/") for path in trained) == (name in ("vit", "bert"))
    assert_exact(model, params, frozen, name, method)


@pytest.mark.parametrize("part", ["bias-only", "last block"])
@pytest.mark.parametrize("name", NAMES)
def test_clipped_sums_of_a_part_are_those_of_vmap(name: str, part: str) -> None:
    chosen = section(name, trainable=PATTERNS[name][part])
    model = models.build(chosen, example=example_of(name), classes=tiny.CLASSES)
    params = model.init(jax.random.key(0))
    frozen = frozen_paths(chosen, params)
    assert 0 < len(frozen) < len(paths_of(params))
    assert_exact(model, params, frozen, name, "auto")


@pytest.mark.parametrize("name", NAMES)
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(name: str) -> None:
    model, params, _ = adapted(name)
    _, data, expected = tiny.golden(name)
    fresh = model.init(jax.random.key(3))
    np.testing.assert_allclose(tiny.logits(model, fresh, data), expected, rtol=1e-4, atol=1e-4)
    found = tiny.logits(model, params, data)
    assert np.abs(found - expected).max() > 1e-2
    plain, golden_params = tiny.golden_model(name)
    without = merged(params, read(LORA))
    assert jax.tree.structure(without) == jax.tree.structure(golden_params)
    np.testing.assert_allclose(tiny.logits(plain, without, data), found, rtol=1e-4, atol=1e-4)


def test_the_product_of_the_factors_is_scaled_by_alpha_over_rank() -> None:
    model, params, _ = adapted("gpt2")
    _, data, _ = tiny.golden("gpt2")
    plain, weights = tiny.golden_model("gpt2")
    weights = jax.tree.map(np.array, weights)
    for i, layer in params["layers"].items():
        for name in ("qkv", "out"):
            factors = layer["attention"][name]
            weights["layers"][i]["attention"][name]["kernel"] += 2.0 * np.asarray(factors["lora_a"] @ factors["lora_b"])
    found = tiny.logits(model, params, data)
    np.testing.assert_allclose(found, tiny.logits(plain, weights, data), rtol=1e-4, atol=1e-4)


def test_a_is_normal_and_b_is_zero() -> None:
    model, _, _ = adapted("gpt2")
    wide = models.build(
        config.Model(name="gpt2", options=tiny.OPTIONS["gpt2"] | {"width": 512}, lora={"rank": 64}),
        example=example_of("gpt2"),
        classes=None,
    )
    layers = wide.init(jax.random.key(0))["layers"]
    a, other = (np.asarray(layers[i]["attention"]["qkv"]["lora_a"]) for i in (0, 1))
    assert a.shape == (512, 64)
    assert abs(a.std() * 512**0.5 - 1) < 0.02
    assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.02
    assert not np.any(layers[0]["attention"]["qkv"]["lora_b"])
    again = model.init(jax.random.key(0)), model.init(jax.random.key(0)), model.init(jax.random.key(1))
    first, same, another = (np.asarray(p["layers"][0]["attention"]["out"]["lora_a"]) for p in again)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, another)


def test_the_base_is_what_it_is_without_adapters() -> None:
    """Random weights too come from the same key."""
    chosen = config.Model(name="gpt2", options=tiny.OPTIONS["gpt2"])
    plain, with_them = (
        models.build(dataclasses.replace(chosen, lora=lora), example=example_of("gpt2"), classes=None)
        for lora in (None, LORA)
    )
    params, more = plain.init(jax.random.key(5)), merged(with_them.init(jax.random.key(5)), read(LORA))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, more)))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_frozen_matrices_are_kept_in_bfloat16(name: str) -> None:
    chosen = section(name, lora=LORA, frozen_dtype="bfloat16")
    model = models.build(chosen, example=example_of(name), classes=tiny.CLASSES)
    params = model.init(jax.random.key(0))
    frozen = frozen_paths(chosen, params)
    for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == (jnp.bfloat16 if path in frozen and leaf.ndim > 1 else jnp.float32), path
    _, data, expected = tiny.golden(name)
    found = tiny.logits(model, params, data)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert_exact(model, params, frozen, name, "auto")


def test_adapters_of_which_none_trains_are_refused() -> None:
    _, params, _ = adapted("gpt2")
    with pytest.raises(InputError, match="no adapter of"):
        frozen_paths(section("gpt2", lora=LORA, trainable=["norm/*"]), params)
    assert "norm/scale" not in frozen_paths(section("gpt2", lora=LORA, trainable=["norm/*", "*lora_a"]), params)
    assert frozen_paths(section("gpt2", lora=LORA, trainable=["*"]), params) == frozenset()  # as asked for


def test_a_short_format_is_refused_where_nothing_is_frozen() -> None:
    with pytest.raises(InputError, match="every parameter trains"):
        models.build(section("vit", frozen_dtype="bfloat16"), example=example_of("vit"), classes=tiny.CLASSES)


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


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "gpt2",
            ["*/query/kernel"],
            r"matches no kernel of an nnx.Linear layer; there are layers/\*/attention/out/kernel, layers/\*",
        ),
        ("cnn", ["*kernel"], "matches conv1/kernel, which is no kernel of an nnx.Linear layer; only those take"),
        ("cnn", None, r"matches no kernel of an nnx.Linear layer; there are dense/kernel, head/kernel"),
    ],
)
def test_targets_that_take_no_adapter_are_refused(name: str, targets: list[str] | None, message: str) -> None:
    lora = {"rank": 2} | ({"targets": targets} if targets else {})
    options = tiny.OPTIONS.get(name, {})
    example = {"image": jax.ShapeDtypeStruct((28, 28, 1), np.uint8)} if name == "cnn" else example_of(name)
    with pytest.raises(InputError, match=message) as caught:
        models.build(config.Model(name=name, options=options, lora=lora), example=example, classes=5)
    assert caught.value.field == "model.lora.targets"


class Shared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(3, 3, rngs=rngs)
        self.b = nnx.Linear(3, 3, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def shared() -> models.Model:
    return from_nnx(Shared, lambda e: e["x"])


class Twice(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(3, 3, rngs=rngs)
        self.b = self.a

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def twice() -> models.Model:
    return from_nnx(Twice, lambda e: e["x"])


def loss(outputs: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
    return outputs.sum()


def of_its_own() -> models.Model:
    return models.Model(init=lambda key: {"kernel": jnp.ones((3, 3))}, apply=lambda p, e: e["x"] @ p["kernel"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("twice", "belongs to several layers"),
        ("shared", "belongs to several layers"),
        ("of_its_own", "this model is not made by .*from_nnx"),
    ],
)
def test_models_that_take_no_adapters_are_refused(function: str, message: str) -> None:
    chosen = config.Model(name=f"test_lora:{function}", lora={"rank": 1, "targets": ["*kernel"]}, loss="test_lora:loss")
    with pytest.raises(InputError, match=message):
        models.build(chosen, example={"x": jax.ShapeDtypeStruct((3,), np.float32)}, classes=3)
