"""Decoder language models: the published sizes, and the logits of `transformers` with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import LANGUAGE_MODELS, build, columns, golden, golden_model, logits, size

from dpdist import config, models
from dpdist.errors import InputError

TOKENS = {"input_ids": jax.ShapeDtypeStruct((128,), jnp.int32)}
SMOL = {"vocabulary": 49152, "width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp": 1536, "tied": True}
GEMMA = {"vocabulary": 256000, "width": 2048, "depth": 18, "heads": 8, "kv_heads": 1, "head_width": 256, "mlp": 16384}


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("gpt2", {}, 124_439_808),
        ("gpt2", {"variant": "medium"}, 354_823_168),
        ("llama", SMOL, 134_515_008),
        ("llama", GEMMA | {"style": "gemma"}, 2_506_172_416),
    ],
    ids=["gpt2", "gpt2-medium", "SmolLM-135M", "gemma-2b"],
)
def test_the_published_sizes(name: str, options: dict[str, Any], parameters: int) -> None:
    model = models.build(config.Model(name=name, options=options), example=TOKENS, classes=None)
    assert size(jax.eval_shape(model.init, jax.random.key(0))) == parameters


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    _, data, expected = golden(name)
    np.testing.assert_allclose(logits(*golden_model(name), data), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_those_of_transformers_today(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the peers extra; the golden files stand in for it")
    pytest.importorskip("transformers", reason="needs the peers extra; the golden files stand in for it")
    import make_golden

    expected = getattr(make_golden, name)(tmp_path, seed=1)
    model = build(name, pretrained=str(tmp_path))
    found = logits(model, model.init(jax.random.key(0)), columns(name))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_no_token_sees_a_later_one_or_one_that_is_hidden(name: str) -> None:
    _, data, expected = golden(name)
    later = data["input_ids"].copy()
    later[:, 6:] = 49 - later[:, 6:]
    found = logits(*golden_model(name), data | {"input_ids": later})
    np.testing.assert_allclose(found[:, :6], expected[:, :6], rtol=1e-4, atol=1e-4)
    assert np.abs(found[0, 6:] - expected[0, 6:]).max() > 0.1
    hidden = data["attention_mask"].copy()
    hidden[:, 2] = 0
    other = data["input_ids"].copy()
    other[:, 2] = 49 - other[:, 2]
    a, b = (logits(*golden_model(name), {"input_ids": i, "attention_mask": hidden}) for i in (data["input_ids"], other))
    np.testing.assert_allclose(a[:2, 3:], b[:2, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_without_a_mask_every_token_is_seen(name: str) -> None:
    path, data, _ = golden(name)
    model = build(name, pretrained=str(path))
    params = model.init(jax.random.key(0))
    full = data | {"attention_mask": np.ones((4, 10), np.int32)}
    found = logits(model, params, {"input_ids": data["input_ids"]})
    np.testing.assert_allclose(found, logits(model, params, full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_padding_of_a_batch_is_finite_and_an_unknown_token_is_not(name: str) -> None:
    """Padding is an example of zeros; an example that is not finite contributes nothing to a step."""
    _, data, _ = golden(name)
    model, params = golden_model(name)
    assert np.isfinite(logits(model, params, {name: np.zeros_like(rows) for name, rows in data.items()})).all()
    for unknown in (50, -1, -100):
        tokens = data["input_ids"].copy()
        tokens[:, 0] = unknown
        assert np.isnan(logits(model, params, data | {"input_ids": tokens})).all()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_products_in_bfloat16_are_close(name: str) -> None:
    path, data, expected = golden(name)
    model = build(name, pretrained=str(path), dtype="bfloat16")
    found = logits(model, model.init(jax.random.key(0)), data)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_random_parameters_give_each_example_other_logits(name: str) -> None:
    model = build(name, depth=1)
    found = logits(model, model.init(jax.random.key(0)), columns(name))
    assert np.isfinite(found).all()
    assert (found.std(0) > 1e-3).all()


def test_an_untied_llama_may_be_tied(tmp_path: Path) -> None:
    tensors = load_file(golden("llama")[0])
    words = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": words}, tmp_path / "tied.safetensors")
    tied = build("llama", pretrained=str(tmp_path / "tied.safetensors"), tied=True)
    params = tied.init(jax.random.key(0))
    assert "unembed" not in params
    twice = build("llama", pretrained=str(tmp_path / "tied.safetensors"))
    data = columns("llama")
    np.testing.assert_allclose(
        logits(tied, params, data), logits(twice, twice.init(jax.random.key(0)), data), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match=r"'lm_head.weight' is not its 'embed_tokens.weight'"):
        build("llama", pretrained=str(golden("llama")[0]), tied=True).init(jax.random.key(0))


def test_older_gpt2s_are_read_too(tmp_path: Path) -> None:
    """The published one has no prefix, holds the causal mask, and the output layer a second time."""
    tensors = {name.removeprefix("transformer."): array for name, array in load_file(golden("gpt2")[0]).items()}
    older = tensors | {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32), "lm_head.weight": tensors["wte.weight"]}
    save_file(older, tmp_path / "x.safetensors")
    found = build("gpt2", pretrained=str(tmp_path / "x.safetensors")).init(jax.random.key(0))
    _, expected = golden_model("gpt2")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {"variant": "huge"}, "there are small, medium, large, xl"),
        ("gpt2", {"positions": 9}, r"at most 9 tokens, not \(10,\)"),
        ("gpt2", {"heads": 3}, "width 32 is not a multiple of 3 heads"),
        ("gpt2", {"data": {"text": np.zeros((1, 10), np.int32)}}, "a column 'input_ids' .*, not None"),
        ("gpt2", {"data": {"input_ids": np.zeros((1, 10), np.float32)}}, "integers in column 'input_ids', not float32"),
        ("llama", {"width": None}, "width is missing; give it, or pretrained weights"),
        ("llama", {"heads": 3}, "3 heads are not a multiple of 2 kv_heads"),
        ("llama", {"heads": 6}, "width 32 is not a multiple of 6 heads"),
        ("llama", {"head_width": 7}, "head_width 7 is not even"),
        ("llama", {"style": "falcon"}, "there are llama, gemma"),
        ("llama", {"dtype": "half"}, "there are float32, bfloat16"),
    ],
)
def test_options_that_cannot_be_used_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(name, **options)
    assert caught.value.field == "model.options"
