"""Vision Transformers: the published sizes, and the logits of `transformers` with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, build, columns, golden, golden_model, logits, size

from dpdist import config, models
from dpdist.errors import InputError
from dpdist.models.vit import VARIANTS

CIFAR = {"image": jax.ShapeDtypeStruct((32, 32, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((), jnp.int32)}


def by_hand(width: int, depth: int, mlp: int, patch: int, classes: int) -> int:
    """Count the parameters at 224x224 from the paper's equations 1 to 4."""
    attention = 4 * (width * width + width)
    dense = width * mlp + mlp + mlp * width + width
    embedding = patch * patch * 3 * width + width + width + (1 + (224 // patch) ** 2) * width
    return embedding + depth * (attention + dense + 4 * width) + 2 * width + width * classes + classes


def shapes(variant: str, **options: Any) -> Any:
    model = models.build(config.Model(name="vit", options={"variant": variant} | options), example=CIFAR, classes=100)
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("variant", "backbone"),
    [
        ("Ti/16", 5_524_416),
        ("S/16", 21_665_664),
        ("B/16", 85_798_656),
        ("L/16", 303_301_632),
        ("H/14", 630_764_800),
    ],
)
def test_the_published_sizes(variant: str, backbone: int) -> None:
    """We build two layers and count the parameters of all."""
    width, depth, _, mlp, patch = VARIANTS[variant].values()
    assert size(shapes(variant, depth=2)) == by_hand(width, 2, mlp, patch, classes=100)
    assert by_hand(width, depth, mlp, patch, classes=100) == backbone + width * 100 + 100


def test_a_whole_vit_has_the_published_size_in_float32() -> None:
    params = shapes("Ti/16")
    assert size(params) - size(params["head"]) == 5_524_416
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_logits_are_those_of_transformers() -> None:
    _, data, expected = golden("vit")
    np.testing.assert_allclose(logits(*golden_model("vit"), data), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_those_of_transformers_today(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the peers extra; the golden files stand in for it")
    pytest.importorskip("transformers", reason="needs the peers extra; the golden files stand in for it")
    from make_golden import vit

    expected = vit(tmp_path, seed=1)
    model = build("vit", pretrained=str(tmp_path))
    found = logits(model, model.init(jax.random.key(0)), columns("vit"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_are_close_and_parameters_stay_in_float32() -> None:
    path, data, expected = golden("vit")
    model = build("vit", pretrained=str(path), dtype="bfloat16")
    params = model.init(jax.random.key(0))
    found = logits(model, params, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.1


def test_every_parameter_learns() -> None:
    model, params = golden_model("vit")
    example = {"image": columns("vit")["image"][0], "label": np.int32(3)}
    gradient = jax.jit(jax.grad(models.example_loss(model)))(params, example)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        if "['key']['bias']" in jax.tree_util.keystr(path):
            assert np.abs(leaf).max() < 1e-6  # a shift of all keys does not move the softmax
        else:
            assert np.any(leaf), path


def test_an_image_of_another_size_is_resized_on_the_device() -> None:
    big, params = golden_model("vit")
    small = build("vit", data={"image": np.zeros((1, 8, 8, 3), np.uint8)})
    image = columns("vit")["image"][:, :8, :8]
    by_hand = bilinear(image.astype(np.float32), 16)
    found = logits(small, params, {"image": image})
    np.testing.assert_allclose(found, logits(big, params, {"image": by_hand}), rtol=1e-4, atol=1e-5)


def bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge to [n, size, size, channels]: pixel centres at half-integers, edges repeated."""
    old = images.shape[1]
    place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.minimum(place.astype(int), old - 2)
    weights = np.zeros((size, old), np.float32)
    weights[np.arange(size), low] = 1 - (place - low)
    weights[np.arange(size), low + 1] = place - low
    return np.einsum("ia,jb,nabc->nijc", weights, weights, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "B16"}, "there are Ti/16, S/16, B/16"),
        ({"image_size": 18}, "image_size 18 is not a multiple of the patch, 4"),
        ({"image_size": 0}, "model.options.image_size = 0: give at least 1"),
        ({"heads": 0}, "model.options.heads = 0: give at least 1"),
        ({"depth": -1}, "model.options.depth = -1: give at least 1"),
        ({"pretrained": 3}, "vit refused them"),
        ({"heads": 5}, "width 32 is not a multiple of 5 heads"),
        ({"dtype": "float16"}, "there are float32, bfloat16"),
        ({"data": {"image": np.zeros((1, 16, 16), np.uint8)}}, r"\[height, width, channels\], not \(16, 16\)"),
        ({"data": {"pixels": np.zeros((1, 16, 16, 3), np.uint8)}}, r"\[height, width, channels\], not None"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build("vit", **options)
    assert caught.value.field == (message.partition(" = ")[0] if message.startswith("model.") else "model.options")


def test_random_parameters_give_each_example_other_logits() -> None:
    model = build("vit", depth=1)
    found = logits(model, model.init(jax.random.key(0)), columns("vit"))
    assert np.isfinite(found).all()
    assert (found.std(0) > 1e-3).all()


def test_the_classes_are_those_of_the_data() -> None:
    assert jax.eval_shape(build("vit").init, jax.random.key(0))["head"]["kernel"].shape == (32, CLASSES)
