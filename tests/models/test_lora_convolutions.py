"""Adapters beside convolutions: exact clipping by their factors, and which of them merge."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from by_hand import QUICK, assert_exact
from flax import nnx

from dpdist import config, models
from dpdist.config.lora import read
from dpdist.errors import InputError
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.models.frozen import frozen_paths
from dpdist.models.lora import merged, with_lora
from dpdist.models.nnx_model import from_nnx
from dpdist.program.gradients import choose_strategies

LORA = {"rank": 3, "alpha": 6}
SIZES = {"layers": [1], "channels": [128], "image_size": 32}
METHODS = ["per_example", "bookkeeping", "ghost", "auto"]


def shaken(params: Any) -> Any:
    """All parameters matter: B is not zero."""

    def shake(path: Any, leaf: Any) -> np.ndarray:
        moved = 0.1 * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        return moved if path[-1].key == "lora_b" else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(shake, params)


def initialised(model: models.Model, seed: int = 0) -> Any:
    return jax.jit(model.init, compiler_options=QUICK)(jax.random.key(seed))


def tiny_bit(**settings: Any) -> tuple[config.Model, models.Model]:
    chosen = config.Model(name="bit_resnet", options=SIZES, **{"lora": LORA} | settings)
    example = {"image": jax.ShapeDtypeStruct((32, 32, 3), np.uint8), "label": jax.ShapeDtypeStruct((), np.int32)}
    return chosen, models.build(chosen, example=example, classes=tiny.CLASSES)


class Net(nnx.Module):
    """Convolutions of one and two axes, in the ways in which they can be strided, padded and dilated."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List(
            [
                nnx.Conv(2, 6, (3, 4), strides=(2, 1), padding="VALID", rngs=rngs),
                nnx.Conv(6, 5, (2, 3), padding="CIRCULAR", kernel_dilation=(1, 2), use_bias=False, rngs=rngs),
                nnx.Conv(5, 7, (3, 3), padding=((1, 0), (0, 2)), input_dilation=(1, 2), rngs=rngs),
            ]
        )
        self.line = nnx.Conv(7, 6, 3, padding="CAUSAL", rngs=rngs)
        self.head = nnx.Linear(6, tiny.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.tanh(conv(x))
        return self.head(nnx.tanh(self.line(x.mean(0))).mean(0))


def net(*, classes: int) -> models.Model:
    return from_nnx(Net, lambda e: e["image"])


def tiny_net(**settings: Any) -> tuple[config.Model, models.Model]:
    lora = LORA | {"targets": ["convs/*/kernel", "line/kernel"]}
    chosen = config.Model(name="test_lora_convolutions:net", **{"lora": lora} | settings)
    example = {"image": jax.ShapeDtypeStruct((9, 10, 2), np.float32), "label": jax.ShapeDtypeStruct((), np.int32)}
    return chosen, models.build(chosen, example=example, classes=tiny.CLASSES)


BUILT: dict[str, Callable[..., tuple[config.Model, models.Model]]] = {"bit_resnet": tiny_bit, "net": tiny_net}
#: Their kernels that have adapters.
ADAPTED = {
    "bit_resnet": {f"stages/0/0/conv{i}" for i in (1, 2, 3)},
    "net": {"convs/0", "convs/1", "convs/2", "line"},
}


def images(name: str) -> np.ndarray:
    draw = np.random.default_rng(7)
    if name == "bit_resnet":
        return draw.integers(0, 256, (4, 32, 32, 3), np.uint8)
    return draw.normal(size=(4, 9, 10, 2)).astype(np.float32)


@cache
def problem(name: str) -> tuple[models.Model, Any, frozenset[str], dict[str, np.ndarray]]:
    chosen, model = BUILT[name]()
    params = shaken(initialised(model))
    return model, params, frozen_paths(chosen, params), {"image": images(name), "label": np.array([0, 3, 1, 4])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUILT)
def test_clipped_sums_beside_convolutions_are_those_of_vmap(name: str, method: str) -> None:
    model, params, frozen, batch = problem(name)
    expected = {f"{layer}/{factor}" for layer in ADAPTED[name] for factor in ("lora_a", "lora_b")}
    assert set(paths_of(params)) - frozen == expected | {"head/kernel", "head/bias"}
    assert_exact(model, params, frozen, batch, method)


@pytest.mark.parametrize("name", BUILT)
def test_clipping_knows_both_factors_of_a_convolution(name: str) -> None:
    """Also of BiT, whose own kernels are standardised and so have no ghost norm; frozen, they have none at all."""
    model, params, frozen, batch = problem(name)
    example = jax.tree.map(lambda x: x[0], batch)
    leaves = choose_strategies(
        models.example_loss(model), params, example, strategies={"*": "ghost"}, frozen=frozen, method="auto"
    )
    assert {leaf.path for leaf in leaves} == set(paths_of(params)) - frozen
    assert {leaf.path for leaf in leaves if leaf.strategy != "ghost"} == {"head/bias"}


@pytest.mark.parametrize("name", BUILT)
def test_new_adapters_change_nothing_and_those_of_plain_convolutions_merge(name: str) -> None:
    model, params, _, batch = problem(name)
    _, plain = BUILT[name](lora=None)
    weights = initialised(plain)
    fresh = tiny.logits(model, initialised(model), batch)
    np.testing.assert_array_equal(fresh, tiny.logits(plain, weights, batch))
    found = tiny.logits(model, params, batch)
    assert np.abs(found - fresh).max() > 1e-3
    if name == "net":
        without = merged(model, params, read(LORA))
        assert jax.tree.structure(without) == jax.tree.structure(weights)
        np.testing.assert_allclose(tiny.logits(plain, without, batch), found, rtol=1e-4, atol=1e-4)
        # By hand, of the kernel alone.
        conv = params["convs"][1]
        products = np.einsum("hwir,ro->hwio", np.asarray(conv["lora_a"]), np.asarray(conv["lora_b"]))
        np.testing.assert_allclose(without["convs"][1]["kernel"], np.asarray(conv["kernel"]) + 2 * products, rtol=1e-5)


def test_the_branch_beside_a_standardised_convolution_is_not_standardised() -> None:
    """By hand, of one layer alone: 2 conv(x, A) B beside what the layer gives."""
    model, params, _, _ = problem("bit_resnet")
    layer = nnx.merge(*nnx.split(nnx.eval_shape(lambda: model.module(nnx.Rngs(0))).stages[0][0].conv2))
    factors = params["stages"][0][0]["conv2"]
    for name, value in factors.items():
        getattr(layer, name).set_value(jnp.asarray(value))
    x = jax.random.normal(jax.random.key(1), (6, 5, 32))
    kernel = np.asarray(factors["kernel"], np.float64).reshape(-1, 32)
    standard = ((kernel - kernel.mean(0)) / np.sqrt(kernel.var(0) + 1e-8)).reshape(3, 3, 32, 32)
    whole = standard + 2 * (np.asarray(factors["lora_a"]) @ np.asarray(factors["lora_b"]))
    padded = np.pad(np.asarray(x, np.float64), ((1, 1), (1, 1), (0, 0)))
    expected = sum(padded[i : i + 6, j : j + 5] @ whole[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_has_the_variance_of_one_over_all_inputs_of_an_output() -> None:
    model = with_lora(
        from_nnx(lambda rngs: nnx.Sequential(nnx.Conv(64, 64, (3, 3), rngs=rngs)), lambda e: e["x"]),
        read({"rank": 64, "targets": ["*kernel"]}),
    )
    first, again, other = (initialised(model, seed)["layers"][0] for seed in (0, 0, 1))
    assert first["lora_a"].shape == (3, 3, 64, 64)
    assert abs(np.std(first["lora_a"]) * 576**0.5 - 1) < 0.02
    assert not np.any(first["lora_b"])
    assert np.array_equal(first["lora_a"], again["lora_a"])
    assert not np.array_equal(first["lora_a"], other["lora_a"])


def test_a_standardised_kernel_does_not_merge_and_the_head_of_a_bit_does() -> None:
    model, params, _, batch = problem("bit_resnet")
    with pytest.raises(InputError, match="is standardised before its use, so its adapter cannot be merged") as caught:
        merged(model, params, read(LORA))
    assert (caught.value.field, caught.value.value) == ("model.lora.targets", "stages/0/0/conv1/kernel")
    lora = LORA | {"targets": ["head/kernel"]}
    _, of_head = tiny_bit(lora=lora)
    adapted = shaken(initialised(of_head))
    without = merged(of_head, adapted, read(lora))
    _, plain = tiny_bit(lora=None)
    found = tiny.logits(of_head, adapted, batch)
    np.testing.assert_allclose(tiny.logits(plain, without, batch), found, rtol=1e-4, atol=1e-4)


def test_frozen_kernels_of_convolutions_are_kept_in_bfloat16() -> None:
    chosen, model = tiny_bit(frozen_dtype="bfloat16")
    params = jax.eval_shape(model.init, jax.random.key(0))
    frozen = frozen_paths(chosen, params)
    kernel = params["stages"][0][0]["conv2"]
    assert {name: leaf.dtype for name, leaf in kernel.items()} == {
        "kernel": jnp.bfloat16,
        "lora_a": jnp.float32,
        "lora_b": jnp.float32,
    }
    assert "stem/kernel" in frozen
    with pytest.raises(InputError, match="is standardised"):  # the module is still known
        merged(model, params, read(LORA))
