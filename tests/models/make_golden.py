"""Make the files in `golden/`: random weights of other libraries' models, and the logits that they give.

Run it by hand with the `peers` extra installed; the tests that read the files do not need that extra:

    python tests/models/make_golden.py [NAME ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tiny import CLASSES, GOLDEN, OPTIONS, columns


def shake(model: Any, by: float) -> Any:
    """Add noise to every parameter: with biases of 0 and gains of 1, a missing one would not be noticed."""
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += by * torch.randn(parameter.shape)
    return model.eval()


def pixels(data: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy((data["image"].astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)


def vit(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`; return its logits of the examples."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    given = OPTIONS["vit"]
    config = ViTConfig(
        hidden_size=given["width"],
        num_hidden_layers=given["depth"],
        num_attention_heads=given["heads"],
        intermediate_size=given["mlp"],
        image_size=given["image_size"],
        patch_size=given["patch"],
        num_labels=CLASSES,
    )
    model = shake(ViTForImageClassification(config), 0.2)
    model.save_pretrained(directory)
    with torch.no_grad():
        return model(pixels(columns("vit"))).logits.numpy()


def bert(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`; return its logits of the examples."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    given = OPTIONS["bert"]
    config = BertConfig(
        vocab_size=given["vocabulary"],
        hidden_size=given["width"],
        num_hidden_layers=given["depth"],
        num_attention_heads=given["heads"],
        intermediate_size=given["mlp"],
        max_position_embeddings=given["positions"],
        num_labels=CLASSES,
    )
    model = shake(BertForSequenceClassification(config), 0.2)
    model.save_pretrained(directory)
    with torch.no_grad():
        return model(**{name: torch.from_numpy(rows) for name, rows in columns("bert").items()}).logits.numpy()


def gpt2(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`; return its logits of the examples."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    given = OPTIONS["gpt2"]
    config = GPT2Config(
        vocab_size=given["vocabulary"],
        n_positions=given["positions"],
        n_embd=given["width"],
        n_layer=given["depth"],
        n_head=given["heads"],
        n_inner=given["mlp"],
    )
    return language_model(shake(GPT2LMHeadModel(config), 0.2), directory, "gpt2")


def llama(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`; return its logits of the examples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    given = OPTIONS["llama"]
    config = LlamaConfig(
        **decoder_sizes(given), rms_norm_eps=given["epsilon"], rope_parameters={"rope_theta": given["theta"]}
    )
    return language_model(shake(LlamaForCausalLM(config), 0.2), directory, "llama")


def gemma(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`; return its logits of the examples."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(seed)
    given = OPTIONS["gemma"]
    config = GemmaConfig(**decoder_sizes(given), head_dim=given["head_width"])
    return language_model(shake(GemmaForCausalLM(config), 0.2), directory, "gemma")


def decoder_sizes(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": given["vocabulary"],
        "max_position_embeddings": given["positions"],
        "hidden_size": given["width"],
        "num_hidden_layers": given["depth"],
        "num_attention_heads": given["heads"],
        "num_key_value_heads": given["kv_heads"],
        "intermediate_size": given["mlp"],
    }


def language_model(model: Any, directory: Path, name: str) -> np.ndarray:
    model.save_pretrained(directory)
    with torch.no_grad():
        return model(**{column: torch.from_numpy(rows) for column, rows in columns(name).items()}).logits.numpy()


def bit_resnet(directory: Path, seed: int) -> np.ndarray:
    """Save a model with random weights in `directory`, in half precision; return its logits of the examples."""
    from safetensors.torch import save_file as save_tensors
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    torch.manual_seed(seed)
    given = OPTIONS["bit_resnet"]
    model = ResNetV2(
        layers=given["layers"],
        channels=given["channels"],
        stem_chs=given["channels"][0] // 4,
        num_classes=CLASSES,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
    )
    model = shake(model, 0.1).half()
    save_tensors(model.state_dict(), directory / "model.safetensors")
    with torch.no_grad():
        return model.float()(pixels(columns("bit_resnet"))).numpy()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    makers = {make.__name__: make for make in (vit, bert, gpt2, llama, gemma, bit_resnet)}
    for name in sys.argv[1:] or makers:
        make = makers[name]
        with tempfile.TemporaryDirectory() as directory:
            logits = make(Path(directory), seed=0)
            shutil.copyfile(Path(directory) / "model.safetensors", GOLDEN / f"{name}.safetensors")
        save_file(columns(name) | {"logits": logits}, GOLDEN / f"{name}.expected.safetensors")
        print(name, logits.round(2).tolist())
