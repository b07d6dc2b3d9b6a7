"""Losses that are means within one example: of a unit's records and of augmented views; clipped as one example is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dpdist import models
from dpdist.data.units import MASK
from dpdist.errors import InputError
from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.models.augment import augmentation
from dpdist.models.whole import over_records, over_views

RECORDS = 3
PRESENT = np.array([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def unit_problem(name: str) -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
    """Loss of a record, loss of a unit, parameters, and four units made of the golden examples."""
    model, params = tiny.golden_model(name)
    columns = tiny.columns(name) | {"label": np.array([0, 3, 1, 4], np.int32)}
    which = np.where(PRESENT, np.arange(12).reshape(4, 3) % 4, (np.arange(12).reshape(4, 3) % 4)[:, :1])
    batch = {column: values[which] for column, values in columns.items()} | {MASK: PRESENT}
    loss = models.example_loss(model)
    return loss, over_records(loss, RECORDS, MASK), params, batch


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "auto") for name in tiny.OPTIONS), ("vit", "per_example"), ("vit", "bookkeeping"), ("vit", "ghost")],
)
def test_a_units_gradient_is_the_mean_over_its_records_and_is_clipped_as_one(name: str, method: str) -> None:
    loss, of_unit, params, batch = unit_problem(name)
    gradient = jax.jit(jax.grad(loss))

    def by_hand(unit: int) -> np.ndarray:
        rows = [{c: v[unit, r] for c, v in batch.items() if c != MASK} for r in range(RECORDS) if PRESENT[unit, r]]
        return np.mean([flat(gradient(params, row)) for row in rows], axis=0)

    gradients = np.stack([by_hand(unit) for unit in range(4)])
    lengths = np.linalg.norm(gradients, axis=1)
    c = float(np.median(lengths))
    expected = (gradients * np.minimum(1, c / lengths)[:, None]).sum(axis=0)
    sums, norms = jax.jit(clipped_grad_sum(of_unit, clip_norm=c, method=method))(params, batch, np.ones(4, np.float32))
    assert np.linalg.norm(flat(sums) - expected) <= 1e-4 * np.linalg.norm(expected)
    assert np.allclose(np.asarray(norms), lengths, rtol=1e-4)


@pytest.mark.parametrize("method", ["per_example", "auto"])
def test_one_users_fifty_records_move_the_sum_by_at_most_c(method: str) -> None:
    draw = np.random.default_rng(0)
    params = {"w": draw.standard_normal((5, 4)).astype(np.float32)}

    def loss(params: Any, example: Any) -> Any:
        return jnp.sum(jnp.square(example["x"] @ params["w"] - example["y"]))

    of_unit = over_records(loss, 50, MASK)
    batch = {
        "x": draw.standard_normal((6, 50, 5)).astype(np.float32) * 100,
        "y": draw.standard_normal((6, 50, 4)).astype(np.float32),
        MASK: draw.random((6, 50)) < 0.7,
    }
    batch[MASK][2] = True  # somebody with all of fifty
    summed = jax.jit(clipped_grad_sum(of_unit, clip_norm=0.5, method=method))
    everybody, without = np.ones(6, np.float32), (np.arange(6) != 2).astype(np.float32)
    moved = flat(summed(params, batch, everybody)[0]) - flat(summed(params, batch, without)[0])
    assert 0.499 < np.linalg.norm(moved) <= 0.5 * (1 + 1e-6)
    other = batch | {"x": np.where(np.arange(6)[:, None, None] == 2, -1e30, batch["x"]).astype(np.float32)}
    assert np.linalg.norm(flat(summed(params, other, everybody)[0]) - flat(summed(params, batch, without)[0])) <= 0.5001


def test_what_stands_in_a_units_padding_does_not_matter() -> None:
    _, of_unit, params, batch = unit_problem("vit")
    unit = {column: values[2] for column, values in batch.items()}
    other = unit | {"image": np.where(PRESENT[2][:, None, None, None], unit["image"], 255).astype(np.uint8)}
    assert flat(jax.grad(of_unit)(params, unit)) == pytest.approx(flat(jax.grad(of_unit)(params, other)), abs=1e-9)


IMAGE = {"image": jax.ShapeDtypeStruct((12, 10, 3), np.uint8), "label": jax.ShapeDtypeStruct((), np.int32)}


def views(name: str, count: int, **options: int) -> np.ndarray:
    """Views of one image whose pixels tell where they were."""
    image = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10, 1) + np.zeros(3, np.uint8)
    augment = augmentation(name, options, IMAGE)
    keys = jax.random.split(jax.random.key(1), count)
    found = jax.vmap(lambda key: augment({"image": jnp.asarray(image), "label": jnp.int32(0)}, key)["image"])(keys)
    assert found.dtype == np.uint8
    return np.asarray(found)


def test_half_of_the_views_are_mirrored() -> None:
    found = views("flip", 400)
    plain = np.arange(120, dtype=np.uint8).reshape(12, 10)
    mirrored = [np.array_equal(view[..., 0], plain[:, ::-1]) for view in found]
    assert all(m or np.array_equal(v[..., 0], plain) for m, v in zip(mirrored, found, strict=True))
    assert 150 < sum(mirrored) < 250


def test_crops_are_moved_by_up_to_the_padding_and_all_ways_occur() -> None:
    image = np.arange(120, dtype=np.uint8).reshape(12, 10)
    padded = np.pad(image, 2, mode="reflect")
    windows = {padded[top : top + 12, left : left + 10].tobytes(): (top, left) for top in range(5) for left in range(5)}
    seen = {windows[view[..., 0].tobytes()] for view in views("crop", 600, padding=2)}
    assert len(seen) == 25


def test_the_gradient_of_views_is_the_mean_of_theirs() -> None:
    model, params = tiny.golden_model("vit")
    loss, columns = models.example_loss(model), tiny.columns("vit")
    example = {"image": columns["image"][0], "label": np.int32(3)}
    shapes = {name: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype) for name, value in example.items()}
    augment = augmentation("flip_and_crop", {"padding": 3}, shapes)
    whole, key = over_views(loss, augment, 4, randomised=False), jax.random.key(7)
    single = over_views(loss, augment, 1, randomised=False)
    found = flat(jax.grad(whole)(params, example | {"key": key}))
    parts = [flat(jax.grad(single)(params, example | {"key": each})) for each in jax.random.split(key, 4)]
    assert np.linalg.norm(found - np.mean(parts, axis=0)) <= 1e-5 * np.linalg.norm(found)
    assert not np.allclose(parts[0], parts[1])
    # Clipped as one example, by every method.
    batch = {name: np.stack([value] * 2) for name, value in example.items()} | {"key": jax.random.split(key, 2)}
    c, mask = float(np.linalg.norm(found)) / 2, np.ones(2, np.float32)
    reference, _ = jax.jit(clipped_grad_sum(whole, clip_norm=c, method="per_example"))(params, batch, mask)
    for method in ("auto", "ghost"):
        sums, _ = jax.jit(clipped_grad_sum(whole, clip_norm=c, method=method))(params, batch, mask)
        assert np.linalg.norm(flat(sums) - flat(reference)) <= 1e-4 * np.linalg.norm(flat(reference))


def test_a_randomised_model_gets_a_key_of_its_own_in_every_view() -> None:
    seen = []

    def loss(params: Any, example: Any) -> Any:
        seen.append("key" in example)
        return jax.random.uniform(example["key"]) if "key" in example else jnp.float32(0)

    augment = augmentation("flip", {}, IMAGE)
    one = {"image": jnp.zeros((12, 10, 3), jnp.uint8), "key": jax.random.key(0)}
    first = float(over_views(loss, augment, 1, randomised=True)({}, one))
    many = float(over_views(loss, augment, 200, randomised=True)({}, one))
    assert abs(many - 0.5) < 0.1
    assert first != many
    over_views(loss, augment, 2, randomised=False)({}, one)
    assert seen[-1] is False


@pytest.mark.parametrize(
    ("name", "options", "example", "words"),
    [
        ("flop", {}, IMAGE, "give one of flip, crop, flip_and_crop, or module:function"),
        ("crop", {"pad": 3}, IMAGE, "give {padding: PIXELS}"),
        ("crop", {"padding": 0}, IMAGE, "at least 1"),
        ("crop", {"padding": 10}, IMAGE, "11 pixels or more, not"),
        ("flip", {}, {"image": jax.ShapeDtypeStruct((64,), np.float32)}, "of shape"),
        ("flip", {}, {"input_ids": jax.ShapeDtypeStruct((64,), np.int32)}, "a column 'image'"),
    ],
)
def test_what_cannot_be_augmented_is_refused(name: str, options: Any, example: Any, words: str) -> None:
    with pytest.raises(InputError, match=r"training\.augment") as caught:
        augmentation(name, options, example)
    assert words in str(caught.value)
