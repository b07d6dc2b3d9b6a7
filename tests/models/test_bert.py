"""BERT encoders: the published sizes, and the logits of `transformers` with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import build, columns, golden, golden_model, logits, size

from dpdist import config, models
from dpdist.errors import InputError

TOKENS = {"input_ids": jax.ShapeDtypeStruct((128,), jnp.int32), "label": jax.ShapeDtypeStruct((), jnp.int32)}


def by_hand(width: int, depth: int, mlp: int) -> int:
    """Count the parameters of the encoder and its pooler from the architecture."""
    attention = 4 * (width * width + width)
    dense = width * mlp + mlp + mlp * width + width
    embedding = (30522 + 512 + 2) * width + 2 * width
    return embedding + depth * (attention + dense + 4 * width) + width * width + width


@pytest.mark.parametrize(
    ("variant", "sizes", "encoder"),
    [
        ("mini", (256, 4, 1024), 11_170_560),
        ("small", (512, 4, 2048), 28_763_648),
        ("base", (768, 12, 3072), 109_482_240),
    ],
)
def test_the_published_sizes(variant: str, sizes: tuple[int, int, int], encoder: int) -> None:
    model = models.build(config.Model(name="bert", options={"variant": variant}), example=TOKENS, classes=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert size(params) - size(params["head"]) == by_hand(*sizes) == encoder


def test_logits_are_those_of_transformers() -> None:
    _, data, expected = golden("bert")
    np.testing.assert_allclose(logits(*golden_model("bert"), data), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_those_of_transformers_today(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the peers extra; the golden files stand in for it")
    pytest.importorskip("transformers", reason="needs the peers extra; the golden files stand in for it")
    from make_golden import bert

    expected = bert(tmp_path, seed=1)
    model = build("bert", pretrained=str(tmp_path))
    found = logits(model, model.init(jax.random.key(0)), columns("bert"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_a_mask_every_token_is_seen_and_without_segments_all_are_the_first() -> None:
    path, data, _ = golden("bert")
    full = data | {"attention_mask": np.ones((4, 10), np.int32), "token_type_ids": np.zeros((4, 10), np.int32)}
    bare = {"input_ids": data["input_ids"]}
    model = build("bert", pretrained=str(path))
    params = model.init(jax.random.key(0))
    np.testing.assert_allclose(logits(model, params, bare), logits(model, params, full), rtol=1e-4, atol=1e-5)


def test_what_the_mask_hides_does_not_matter() -> None:
    _, data, expected = golden("bert")
    hidden = data["attention_mask"] == 0
    other = data | {"input_ids": np.where(hidden, 49 - data["input_ids"], data["input_ids"])}
    found = logits(*golden_model("bert"), other)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_of_a_batch_is_finite_and_an_unknown_token_is_not() -> None:
    """Padding is an example of zeros; an example that is not finite contributes nothing to a step."""
    _, data, _ = golden("bert")
    model, params = golden_model("bert")
    assert np.isfinite(logits(model, params, {name: np.zeros_like(rows) for name, rows in data.items()})).all()
    assert np.isnan(logits(model, params, data | {"input_ids": np.full((4, 10), 50, np.int32)})).all()


def test_products_in_bfloat16_are_close() -> None:
    path, data, expected = golden("bert")
    model = build("bert", pretrained=str(path), dtype="bfloat16")
    found = logits(model, model.init(jax.random.key(0)), data)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "huge"}, "there are mini, small, base"),
        ({"positions": 9}, r"at most 9 tokens, not \(10,\)"),
        ({"heads": 3}, "width 32 is not a multiple of 3 heads"),
        ({"dtype": "half"}, "there are float32, bfloat16"),
        ({"data": {"text": np.zeros((1, 10), np.int32)}}, "a column 'input_ids' .*, not None"),
        ({"data": {"input_ids": np.zeros((1, 10, 2), np.int32)}}, r"not \(10, 2\)"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build("bert", **options)
    assert caught.value.field == "model.options"


def test_random_parameters_give_each_example_other_logits() -> None:
    model = build("bert", depth=1)
    found = logits(model, model.init(jax.random.key(0)), columns("bert"))
    assert np.isfinite(found).all()
    assert (found.std(0) > 1e-3).all()
