"""The config.json beside pretrained weights: it is read, and whatever contradicts it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import BUILT_AS, CLASSES, GOLDEN, OPTIONS, columns, golden, logits

from dpdist import config, models
from dpdist.errors import InputError
from dpdist.models.families import settled

LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 12, "rms_norm_eps": 1e-5}
LLAMA |= {"rope_theta": 100.0, "tie_word_embeddings": False, "hidden_act": "silu", "rope_scaling": None}
GEMMA = LLAMA | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu_pytorch_tanh"}
GEMMA |= {"rope_theta": 1e4, "rms_norm_eps": 1e-6}
GEMMA.pop("tie_word_embeddings")
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"n_inner": 48, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
BERT = {"model_type": "bert", "vocab_size": 50, "max_position_embeddings": 12, "hidden_size": 32}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "gelu"}
BERT |= {"type_vocab_size": 2, "layer_norm_eps": 1e-12}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "qkv_bias": True}
VIT |= {"intermediate_size": 48, "patch_size": 4, "image_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
#: What `transformers` writes beside the golden weights.
FILES = {"llama": LLAMA, "gemma": GEMMA, "gpt2": GPT2, "bert": BERT, "vit": VIT}


def beside(directory: Path, name: str, **changes: Any) -> Path:
    """Save the golden weights with a config.json, changed."""
    shutil.copyfile(GOLDEN / f"{name}.safetensors", directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(FILES[name] | changes))
    return directory


def chosen(name: str, path: Path, **options: Any) -> config.Model:
    return config.Model(name=BUILT_AS.get(name, name), options={"pretrained": str(path)} | options)


def built(name: str, path: Path, **options: Any) -> models.Model:
    example = {column: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for column, rows in columns(name).items()}
    return models.build(chosen(name, path, **options), example=example, classes=CLASSES)


@pytest.mark.parametrize("where", [".", "model.safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_the_weights_alone_are_enough(name: str, where: str, tmp_path: Path) -> None:
    model = built(name, beside(tmp_path, name) / where)
    _, data, expected = golden(name)
    found = logits(model, model.init(jax.random.key(0)), data)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_options_that_agree_with_the_file_are_no_error_and_what_is_kept_needs_no_file(
    name: str, tmp_path: Path
) -> None:
    weights = beside(tmp_path, name)
    kept = settled(chosen(name, weights, **OPTIONS[name]))
    assert {option: kept.options[option] for option in OPTIONS[name]} == OPTIONS[name]
    kept = settled(chosen(name, weights))
    shutil.rmtree(tmp_path)
    assert settled(kept) == kept
    model = built(name, weights, **kept.options)
    jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "options", "field", "message"),
    [
        ("gpt2", {"heads": 2}, "heads", r"config.json says 4 \(n_head\); leave the option out"),
        ("gpt2", {"variant": "small"}, "vocabulary|width|depth|heads", r"\(of variant small\)"),
        ("gpt2", {"epsilon": 1e-6}, "epsilon", r"says 1e-05 \(layer_norm_epsilon\)"),
        ("llama", {"heads": 8}, "heads", r"says 4 \(num_attention_heads\)"),
        ("llama", {"theta": 1e4}, "theta", r"says 100.0 \(rope_theta\)"),
        ("llama", {"style": "gemma"}, "style", "says 'llama'"),
        ("llama", {"tied": True}, "tied", r"says False \(tie_word_embeddings\)"),
        ("gemma", {"style": "llama"}, "style", "says 'gemma'"),
        ("bert", {"heads": 8}, "heads", r"says 4 \(num_attention_heads\)"),
        ("bert", {"variant": "mini"}, "width|depth|heads|mlp", r"\(of variant mini\)"),
        ("vit", {"heads": 8}, "heads", r"says 4 \(num_attention_heads\)"),
    ],
)
def test_an_option_that_contradicts_the_file_is_named_with_both_values(
    name: str, options: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        settled(chosen(name, beside(tmp_path, name), **options))
    assert caught.value.field.removeprefix("model.options.") in field.split("|")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "gpt_neo"}, "is of model_type 'gpt_neo'; gpt2 reads gpt2"),
        ("gpt2", {"activation_function": "relu"}, "has activation_function: 'relu', which gpt2 does not compute"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ("llama", {"model_type": "qwen2"}, "llama reads llama and mistral and gemma"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu in a llama'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: {'rope_type': 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling: {'rope_type': 'yarn'"),
        ("llama", {"attention_bias": True}, "attention_bias: True"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True"),
        ("llama", {"sliding_window": 8}, "sliding_window: 8"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act: 'silu in a gemma'"),
        ("bert", {"hidden_act": "relu"}, "hidden_act: 'relu', which bert does not compute; only 'gelu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ("bert", {"type_vocab_size": 1}, "type_vocab_size: 1"),
        ("bert", {"is_decoder": True}, "is_decoder: True"),
        ("vit", {"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new'"),
        ("vit", {"qkv_bias": False}, "qkv_bias: False"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        settled(chosen(name, beside(tmp_path, name, **changes)))
    assert caught.value.field == "model.options.pretrained"


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_damaged_file_is_reported(content: str, tmp_path: Path) -> None:
    (beside(tmp_path, "bert") / "config.json").write_text(content)
    with pytest.raises(InputError, match="is no JSON object"):
        settled(chosen("bert", tmp_path))


def test_an_image_size_that_is_given_may_be_another(tmp_path: Path) -> None:
    """Position embeddings are interpolated."""
    beside(tmp_path, "vit")
    assert settled(chosen("vit", tmp_path)).options["image_size"] == 16
    assert settled(chosen("vit", tmp_path, image_size=28)).options["image_size"] == 28


@pytest.mark.parametrize(
    ("name", "architecture", "option", "value"),
    [
        ("bit_resnet", "resnetv2_101x3_bit", "layers", [3, 4, 23, 3]),
        ("vit", "vit_large_patch16_384", "heads", 16),
        ("vit", "vit_small_patch32_224", "patch", 32),
    ],
)
def test_timms_architectures_give_the_sizes(
    name: str, architecture: str, option: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    assert settled(chosen(name, tmp_path)).options[option] == value
    with pytest.raises(InputError, match=f"says .*, not .of variant|says {value!r}".replace("[", r"\[")):
        settled(chosen(name, tmp_path, variant="50x1" if name == "bit_resnet" else "Ti/16"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    with pytest.raises(InputError, match=f"is of timm's 'resnet50', which {name} does not compute"):
        settled(chosen(name, tmp_path))
