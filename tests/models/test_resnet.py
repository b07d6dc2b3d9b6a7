"""BiT ResNets: the published sizes, and the logits of `timm` with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import build, columns, golden, golden_model, logits, size

from dpdist import config, models
from dpdist.errors import InputError
from dpdist.models.resnet import CHANNELS, VARIANTS

CIFAR = {"image": jax.ShapeDtypeStruct((32, 32, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((), jnp.int32)}


def by_hand(layers: Sequence[int], factor: int) -> int:
    """Count the parameters before the classifier: kernels without bias; a gain and a shift per normalised channel."""
    channels, total = 64 * factor, 7 * 7 * 3 * 64 * factor
    for depth, out in zip(layers, (256, 512, 1024, 2048), strict=True):
        out, inner = out * factor, out * factor // 4
        total += channels * out  # the shortcut of the first block
        for _ in range(depth):
            total += channels * inner + 3 * 3 * inner * inner + inner * out + 2 * (channels + inner + inner)
            channels = out
    return total + 2 * channels


def shapes(variant: str, **options: Any) -> Any:
    model = models.build(
        config.Model(name="bit_resnet", options={"variant": variant} | options), example=CIFAR, classes=10
    )
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("variant", "backbone"),
    [
        ("50x1", 23_500_352),
        ("50x3", 211_174_080),
        ("101x1", 42_492_480),
        ("101x3", 381_789_888),
        ("152x4", 928_340_224),
    ],
)
def test_the_published_sizes(variant: str, backbone: int) -> None:
    """We build five blocks and count the parameters of all."""
    layers, factor = VARIANTS[variant]["layers"], VARIANTS[variant]["channels"][0] // CHANNELS[0]
    params = shapes(variant, layers=[1, 2, 1, 1])
    assert size(params["head"]) == 2048 * factor * 10 + 10
    assert size(params) - size(params["head"]) == by_hand([1, 2, 1, 1], factor)
    assert by_hand(layers, factor) == backbone


def test_a_whole_bit_50x1_has_the_published_layers_in_float32() -> None:
    params = shapes("50x1")
    assert [len(params["stages"][i]) for i in range(4)] == [3, 4, 6, 3]
    assert size(params) - size(params["head"]) == 23_500_352
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_logits_are_those_of_timm() -> None:
    _, data, expected = golden("bit_resnet")
    np.testing.assert_allclose(logits(*golden_model("bit_resnet"), data), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_those_of_timm_today(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the peers extra; the golden files stand in for it")
    pytest.importorskip("timm", reason="needs the peers extra; the golden files stand in for it")
    from make_golden import bit_resnet

    expected = bit_resnet(tmp_path, seed=1)
    model = build("bit_resnet", pretrained=str(tmp_path))
    found = logits(model, model.init(jax.random.key(0)), columns("bit_resnet"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_are_close() -> None:
    path, data, expected = golden("bit_resnet")
    model = build("bit_resnet", pretrained=str(path), dtype="bfloat16")
    found = logits(model, model.init(jax.random.key(0)), data)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.05


def test_every_parameter_learns() -> None:
    model, params = golden_model("bit_resnet")
    example = {"image": columns("bit_resnet")["image"][0], "label": np.int32(3)}
    gradient = jax.jit(jax.grad(models.example_loss(model)))(params, example)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        assert np.any(leaf), path


def test_the_scale_of_a_kernel_does_not_matter() -> None:
    """Weights are standardised, so the network depends only on their direction."""
    _, data, expected = golden("bit_resnet")
    model, params = golden_model("bit_resnet")
    params = jax.tree.map(lambda leaf: leaf, params)
    params["stages"][1][0]["conv2"]["kernel"] *= 3.0
    params["stages"][0][0]["conv1"]["kernel"] += 0.5
    np.testing.assert_allclose(logits(model, params, data), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "50x2"}, "there are 50x1, 50x3"),
        ({"layers": [1]}, "have to name the same stages"),
        ({"layers": [1, 0]}, "have to name the same stages"),
        ({"layers": []}, "have to name the same stages"),
        ({"channels": [128, 200]}, "multiples of 128"),
        ({"dtype": "half"}, "there are float32, bfloat16"),
        ({"data": {"image": np.zeros((1, 40, 40), np.uint8)}}, r"\[height, width, channels\]"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build("bit_resnet", **options)
    assert caught.value.field == "model.options"


def test_random_parameters_give_each_example_other_logits() -> None:
    model = build("bit_resnet", layers=[1], channels=[128])
    found = logits(model, model.init(jax.random.key(0)), columns("bit_resnet"))
    assert np.isfinite(found).all()
    assert (found.std(0) > 1e-3).all()
