"""Exports that other libraries load, and adapters merged into the layers beside which they trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from dpdist import models
from dpdist.config.lora import read
from dpdist.models.foreign import checkpoint
from dpdist.models.lora import merged
from dpdist.release.trained import TrainedRun

WEIGHTS = "model.safetensors"


def without_adapters(trained: TrainedRun) -> TrainedRun:
    """The same function with adapters merged into the kernels, and every parameter in float32."""
    section, params = trained.config.model, trained.params
    if section.lora is not None:
        params = merged(params, read(section.lora))
    section = dataclasses.replace(section, lora=None, trainable=None, frozen_dtype="float32")
    return dataclasses.replace(
        trained,
        config=dataclasses.replace(trained.config, model=section),
        params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params),
        _model=models.build(section, example=trained.signature.example, classes=trained.signature.classes),
    )


def write_foreign(directory: Path, trained: TrainedRun, library: str, metadata: dict[str, str]) -> None:
    """Write weights and config as `library` reads them.

    Args:
        trained: without adapters.
        metadata: what the weights' file says of itself.

    Raises:
        InputError: the library has no such model.
    """
    tensors, files = checkpoint(trained.config.model, trained.params, library)
    # `transformers` asks for this word, whatever it loads.
    save_file(tensors, directory / WEIGHTS, metadata=metadata | {"format": "pt"})
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
