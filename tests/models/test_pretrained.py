"""Pretrained weights: every tensor must be used, and one that does not fit is named with both shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_vit import bilinear
from tiny import CLASSES, GOLDEN, build, golden, logits, size

from dpdist.errors import InputError
from dpdist.models.pretrained import interpolate_positions

Tensors = dict[str, np.ndarray]


@cache
def key() -> jax.Array:
    """Made when it is used: JAX must not start while modules are imported."""
    return jax.random.key(0)


def loaded(name: str, path: Path, **options: Any) -> Any:
    """Parameters of the tiny model from the weights at `path`."""
    return build(name, pretrained=str(path), **options).init(key())


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def vit() -> Tensors:
    """Return the golden ViT's tensors by name, to change and save."""
    return load_file(GOLDEN / "vit.safetensors")


def saved(directory: Path, tensors: Tensors) -> Path:
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, directory / "x.safetensors")
    return directory / "x.safetensors"


def sharded(directory: Path, tensors: Tensors) -> None:
    """Save tensors as two files and an index, as large models are."""
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# What is read


@pytest.mark.parametrize("name", ["vit", "bert", "bit_resnet"])
def test_a_file_a_directory_and_shards_hold_the_same(name: str, tmp_path: Path) -> None:
    file = GOLDEN / f"{name}.safetensors"
    expected = loaded(name, file)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "shards").mkdir()
    sharded(tmp_path / "shards", load_file(file))
    assert same(expected, loaded(name, tmp_path / "one"))
    assert same(expected, loaded(name, tmp_path / "shards"))
    fresh = jax.eval_shape(build(name).init, key())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


@pytest.mark.parametrize(("name", "prefix"), [("vit", "vit."), ("bert", "bert.")])
def test_an_encoder_saved_without_its_classifier_has_no_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    bare = {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}
    assert len(bare) == len(tensors) - 2
    if name == "vit":  # as google/vit-base-patch16-224-in21k has it
        bare |= {"pooler.dense.weight": np.ones((32, 32), np.float32), "pooler.dense.bias": np.ones(32, np.float32)}
    full, found = loaded(name, GOLDEN / f"{name}.safetensors"), loaded(name, saved(tmp_path, bare))
    assert not np.any(found["head"]["kernel"])
    assert same(full | {"head": None}, found | {"head": None})


def test_older_berts_are_read_too(tmp_path: Path) -> None:
    """bert-base-uncased has the names gamma and beta, and the heads of its pretraining."""
    tensors = load_file(GOLDEN / "bert.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): values
        for name, values in tensors.items()
    }
    older |= {
        "cls.predictions.bias": np.zeros(50, np.float32),
        "bert.embeddings.position_ids": np.arange(12)[None],
    }
    assert same(loaded("bert", GOLDEN / "bert.safetensors"), loaded("bert", saved(tmp_path, older)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_precision_become_float32(vit: Tensors, tmp_path: Path, dtype: Any) -> None:
    found = loaded("vit", saved(tmp_path, {name: values.astype(dtype) for name, values in vit.items()}))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(loaded("vit", GOLDEN / "vit.safetensors")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-3)


# The classifier


def test_a_classifier_for_as_many_classes_is_kept() -> None:
    assert np.any(loaded("vit", GOLDEN / "vit.safetensors")["head"]["kernel"])


@pytest.mark.parametrize("name", ["vit", "bert", "bit_resnet"])
def test_a_classifier_for_other_classes_is_new_and_all_zeros(name: str) -> None:
    path, data, _ = golden(name)
    model = build(name, classes=7, pretrained=str(path))
    params = model.init(key())
    assert np.array_equal(logits(model, params, data), np.zeros((4, 7)))
    kept = {part: values for part, values in loaded(name, path).items() if part != "head"}
    assert same(kept, {part: values for part, values in params.items() if part != "head"})


def test_a_classifier_without_its_bias_is_damaged(vit: Tensors, tmp_path: Path) -> None:
    del vit["classifier.bias"]
    with pytest.raises(InputError, match=r"has no tensor 'classifier\.bias'"):
        loaded("vit", saved(tmp_path, vit))


# Position embeddings


def test_position_embeddings_are_interpolated_and_the_class_token_is_kept(vit: Tensors) -> None:
    params, larger = (loaded("vit", GOLDEN / "vit.safetensors", image_size=size) for size in (16, 28))
    positions = vit["vit.embeddings.position_embeddings"][0]
    assert larger["positions"].shape == (1 + 7 * 7, 32)
    np.testing.assert_array_equal(larger["positions"][0], positions[0])
    expected = bilinear(positions[None, 1:].reshape(1, 4, 4, 32), 7).reshape(49, 32)
    np.testing.assert_allclose(larger["positions"][1:], expected, rtol=1e-5, atol=1e-6)
    assert same(params | {"positions": None}, larger | {"positions": None})


def test_position_embeddings_shrink_too() -> None:
    assert loaded("vit", GOLDEN / "vit.safetensors", image_size=8)["positions"].shape == (5, 32)


@pytest.mark.parametrize("count", [1, 17, 18])
def test_what_is_no_square_grid_is_left_alone(count: int) -> None:
    positions = np.ones((1, count, 3), np.float32)
    assert interpolate_positions(positions, (1, 9, 3)) is positions
    assert interpolate_positions(positions, (1, 17, 4)) is positions


def test_position_embeddings_that_fit_no_grid_are_refused(vit: Tensors, tmp_path: Path) -> None:
    vit["vit.embeddings.position_embeddings"] = vit["vit.embeddings.position_embeddings"][:, :16]
    with pytest.raises(InputError, match=r"'embeddings.position_embeddings' is \(1, 16, 32\), but must be \(1, 17, 32"):
        loaded("vit", saved(tmp_path, vit))


# What does not fit


def drop(tensors: Tensors) -> None:
    del tensors["vit.encoder.layer.1.output.dense.weight"]


def reshape(tensors: Tensors) -> None:
    tensors["vit.encoder.layer.1.output.dense.weight"] = np.zeros((32, 40), np.float32)


def add(tensors: Tensors) -> None:
    tensors["vit.encoder.layer.2.output.dense.weight"] = np.zeros((32, 48), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"has no tensor 'encoder.layer.1.output.dense.weight', which must be \(32, 48\)"),
        (reshape, r"'encoder.layer.1.output.dense.weight' is \(32, 40\), but must be \(32, 48\)"),
        (add, r"has 'encoder.layer.2.output.dense.weight' \(32, 48\), which has no place in the model, and 0 more"),
    ],
)
def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(
    vit: Tensors, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    change(vit)
    with pytest.raises(InputError, match=message) as caught:
        loaded("vit", saved(tmp_path, vit))
    assert caught.value.field == "model.options.pretrained"
    assert "model.options" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, r"has no tensor 'encoder.layer.2"),
        ({"depth": 1}, r"has 'encoder.layer.1.*, which has no place in the model, and 15 more"),
        ({"width": 64}, r"is \(.*32.*\), but must be \(.*64"),
        ({"patch": 2}, r"projection.weight' is \(32, 3, 4, 4\), but must be \(32, 3, 2, 2\)"),
    ],
)
def test_weights_of_another_variant_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded("vit", GOLDEN / "vit.safetensors", **options)


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(InputError, match="are these weights of another architecture"):
        loaded("vit", GOLDEN / "bert.safetensors")


def test_images_of_other_channels_are_refused(vit: Tensors) -> None:
    with pytest.raises(InputError, match=r"projection.weight' is \(32, 3, 4, 4\), but must be \(32, 1, 4, 4\)"):
        loaded("vit", GOLDEN / "vit.safetensors", data={"image": np.zeros((1, 28, 28, 1), np.uint8)})


# Files


def test_a_missing_path_is_reported_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory; nothing is downloaded") as caught:
        loaded("vit", tmp_path / "google" / "vit-base-patch16-224-in21k")
    assert caught.value.field == "model.options.pretrained"


def test_a_directory_without_weights_is_refused_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but nothing; other formats are not read"):
        loaded("vit", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"but pytorch_model.bin; other formats are not read"):
        loaded("vit", tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00."], ids=["empty", "page", "pickle"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is no complete safetensors file"):
        loaded("vit", tmp_path / "x.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((GOLDEN / "vit.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="is no complete safetensors file"):
        loaded("vit", tmp_path / "x.safetensors")


def test_a_missing_shard_is_named(vit: Tensors, tmp_path: Path) -> None:
    sharded(tmp_path, vit)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model-00002-of-00002.safetensors, which model.safetensors.index.json"):
        loaded("vit", tmp_path)


def test_an_index_and_shards_that_disagree_are_refused(vit: Tensors, tmp_path: Path) -> None:
    sharded(tmp_path, vit)
    save_file({"other": np.zeros(3)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"but model-00002-of-00002.safetensors has no such tensor"):
        loaded("vit", tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="is damaged: it maps no tensors to files"):
        loaded("vit", tmp_path)


# Without the file


def test_the_shapes_of_a_model_need_no_file(tmp_path: Path) -> None:
    """Loading a finished run needs only shapes and its checkpoint; the machine may not have the weights."""
    model = build("vit", pretrained=str(tmp_path / "gone"))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert size(params) == size(jax.eval_shape(build("vit").init, key()))
    assert params["head"]["bias"].shape == (CLASSES,)


def test_a_traced_init_is_never_mistaken_for_weights() -> None:
    traced = jax.jit(build("vit", pretrained=str(GOLDEN / "vit.safetensors")).init)(key())
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(traced))
