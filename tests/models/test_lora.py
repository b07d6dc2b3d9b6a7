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
from by_hand import assert_exact

from dpdist import config, models
from dpdist.config.lora import read
from dpdist.errors import InputError
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.models.frozen import frozen_paths
from dpdist.models.lora import merged

LORA = {"rank": 3, "alpha": 6}
NAMES = ["gpt2", "llama", "vit", "bert"]
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


@pytest.mark.parametrize("method", ["per_example", "bookkeeping", "ghost", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_clipped_sums_of_adapters_are_those_of_vmap(name: str, method: str) -> None:
    model, params, frozen = adapted(name)
    trained = set(paths_of(params)) - frozen
    assert {path.split("/")[-1] for path in trained if not path.startswith("head/")} == {"lora_a", "lora_b"}
    assert any(path.startswith("head/") for path in trained) == (name in ("vit", "bert"))
    assert_exact(model, params, frozen, batch_of(name), method)


@pytest.mark.parametrize("part", ["bias-only", "last block"])
@pytest.mark.parametrize("name", NAMES)
def test_clipped_sums_of_a_part_are_those_of_vmap(name: str, part: str) -> None:
    chosen = section(name, trainable=PATTERNS[name][part])
    model = models.build(chosen, example=example_of(name), classes=tiny.CLASSES)
    params = model.init(jax.random.key(0))
    frozen = frozen_paths(chosen, params)
    assert 0 < len(frozen) < len(paths_of(params))
    assert_exact(model, params, frozen, batch_of(name), "auto")


@pytest.mark.parametrize("name", NAMES)
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(name: str) -> None:
    model, params, _ = adapted(name)
    _, data, expected = tiny.golden(name)
    fresh = model.init(jax.random.key(3))
    np.testing.assert_allclose(tiny.logits(model, fresh, data), expected, rtol=1e-4, atol=1e-4)
    found = tiny.logits(model, params, data)
    assert np.abs(found - expected).max() > 1e-2
    plain, golden_params = tiny.golden_model(name)
    without = merged(model, params, read(LORA))
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
    params, more = plain.init(jax.random.key(5)), merged(with_them, with_them.init(jax.random.key(5)), read(LORA))
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
    assert_exact(model, params, frozen, batch_of(name), "auto")


def test_adapters_of_which_none_trains_are_refused() -> None:
    _, params, _ = adapted("gpt2")
    with pytest.raises(InputError, match="no adapter of"):
        frozen_paths(section("gpt2", lora=LORA, trainable=["norm/*"]), params)
    assert "norm/scale" not in frozen_paths(section("gpt2", lora=LORA, trainable=["norm/*", "*lora_a"]), params)
    assert frozen_paths(section("gpt2", lora=LORA, trainable=["*"]), params) == frozenset()  # as asked for


def test_a_short_format_is_refused_where_nothing_is_frozen() -> None:
    with pytest.raises(InputError, match="every parameter trains"):
        models.build(section("vit", frozen_dtype="bfloat16"), example=example_of("vit"), classes=tiny.CLASSES)
