"""Exports that other libraries load, and adapters merged into the layers beside which they trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from dpdist import models
from dpdist.config import Config
from dpdist.config.lora import read
from dpdist.data.tokens import Tokenizer
from dpdist.errors import InputError
from dpdist.models.families import CONFIG
from dpdist.models.foreign import checkpoint
from dpdist.models.lora import merged
from dpdist.release.trained import TrainedRun

WEIGHTS = "model.safetensors"
#: The keys of `special_tokens`.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def without_adapters(trained: TrainedRun) -> TrainedRun:
    """The same function with adapters merged into the kernels, and every parameter in float32."""
    section, params = trained.config.model, trained.params
    if section.lora is not None:
        params = merged(trained._model, params, read(section.lora))
    section = dataclasses.replace(section, lora=None, trainable=None, frozen_dtype="float32")
    return dataclasses.replace(
        trained,
        config=dataclasses.replace(trained.config, model=section),
        params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params),
        _model=models.build(section, example=trained.signature.example, classes=trained.signature.classes),
    )


def special_tokens(config: Config) -> dict[str, int | list[int]]:
    """Ids of special tokens by their keys in `config.json`, as far as they are known here.

    They are those of the tokenizer that the run used, or else in the `config.json` beside the weights that it began
    with; neither need be here any more.
    """
    options, pretrained = config.data.options, config.model.options.get("pretrained")
    if config.data.source == "text":
        with contextlib.suppress(InputError):
            return dict(Tokenizer(options.get("tokenizer"), options.get("length")).special)
    if not isinstance(pretrained, str) or not (path := Path(pretrained).expanduser()).exists():
        return {}
    try:
        said = json.loads(((path if path.is_dir() else path.parent) / CONFIG).read_text())
        known = {key: said[key] for key in TOKENS if key in said}
    except (OSError, ValueError, TypeError):
        return {}
    return {key: value for key, value in known.items() if type(value) is int or isinstance(value, list)}


def write_foreign(directory: Path, trained: TrainedRun, library: str, metadata: dict[str, str]) -> None:
    """Write weights and config as `library` reads them.

    Args:
        trained: without adapters.
        metadata: what the weights' file says of itself.

    Raises:
        InputError: the library has no such model.
    """
    names, tokens = trained.signature.class_names, special_tokens(trained.config)
    tensors, files = checkpoint(trained.config.model, trained.params, library, class_names=names, tokens=tokens)
    # `transformers` asks for this word, whatever it loads.
    save_file(tensors, directory / WEIGHTS, metadata=metadata | {"format": "pt"})
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
