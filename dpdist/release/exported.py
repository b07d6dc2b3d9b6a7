"""Read an export: the model of another run, perhaps another person's, checked for being whole before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dpdist import config as config_module
from dpdist import models
from dpdist.config.file import parse
from dpdist.errors import InputError
from dpdist.release.trained import Signature, TrainedRun
from dpdist.run.fingerprints import params_digest

PARAMS, CONFIG, MODEL = "params.safetensors", "config.yaml", "model.json"
PRIVACY, STATEMENT = "privacy.json", "PRIVACY.md"
#: Of `model.json`; another number is another content.
FORMAT = 1
#: What stands where a path was: an export has none.
REMOVED = "(path removed)"


def load_export(directory: Path, *, allow_code: bool = False) -> TrainedRun:
    """The model in an export, onto one device.

    Args:
        allow_code: run the `module:function` that an export may name as its model.

    Raises:
        InputError: it is no export, is damaged or was changed, or its model is code that is not here.
    """
    privacy = _read(directory / PRIVACY, lambda text: dict(json.loads(text)))
    record = _read(directory / MODEL, json.loads)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(
            str(directory / MODEL), record.get("format") if isinstance(record, dict) else record,
            f"is not of format {FORMAT}, which this version reads; use the version of dpdist that exported it.",
        )  # fmt: skip
    signature = _read(directory / MODEL, lambda text: Signature.from_record(json.loads(text)))
    config = _read(directory / CONFIG, lambda text: config_module.from_dict(parse(text)))
    model = _build(config.model, signature, allow_code=allow_code)
    params = _params(directory, model)
    if params_digest(params) != privacy.get("params_sha256"):
        raise InputError(
            str(directory), "params_sha256",
            f"{PARAMS} does not hold the parameters that {PRIVACY} speaks of: one of them was changed or damaged; get "
            "the export again.",
        )  # fmt: skip
    return TrainedRun(
        config=config,
        params=params,
        step=privacy["released_after_step"],
        privacy=privacy,
        signature=signature,
        _model=model,
    )


def _read(path: Path, meaning: Callable[[str], Any]) -> Any:
    """What a file of an export says.

    Raises:
        InputError: it is missing, or says nothing that can be used.
    """
    try:
        return meaning(path.read_text())
    except FileNotFoundError:
        remedy = f"has no {path.name}: it is no export, or not whole. Name a directory that `dpdist export` has made."
        raise InputError("EXPORT", str(path.parent), remedy) from None
    except InputError as error:
        raise InputError(str(path), error.field, f"cannot be used: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(str(path), type(error).__name__, "is damaged; get the export again.") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def removed_options(options: Mapping[str, Any]) -> list[str]:
    """Names of the model's options that held a path other than that of its first weights, which are not needed."""
    return [name for name, value in options.items() if name != "pretrained" and REMOVED in str(value)]


def _build(section: config_module.Model, signature: Signature, *, allow_code: bool) -> models.Model:
    for setting, name in (("model.name", section.name), ("model.task", section.task)):
        if name is not None and ":" in name and not allow_code:
            remedy = (
                f"is code of whoever made this export, and would run here with your rights; if you trust what is in "
                f"the module {name.partition(':')[0]}, say so: load(..., allow_code=True), or --allow-code."
            )
            raise InputError(setting, name, remedy)
    if gone := removed_options(section.options):
        remedy = f"held a path, which no export keeps; write yours into {CONFIG}."
        raise InputError(f"model.options.{gone[0]}", section.options[gone[0]], remedy)
    # Neither the first weights nor the loss are needed to predict.
    options = {name: value for name, value in section.options.items() if name != "pretrained"}
    section = dataclasses.replace(section, options=options, loss=config_module.Model().loss)
    try:
        return models.build(section, example=signature.example, classes=signature.classes)
    except InputError as error:
        if ":" not in str(error.value) or not error.field.startswith("model."):
            raise
        module = str(error.value).partition(":")[0]
        raise InputError(
            error.field,
            error.value,
            f"is code that no export holds; get the module {module} from whoever exported this, and install it or "
            f"start where it lies. ({error.remedy})",
        ) from error


def _params(directory: Path, model: models.Model) -> Any:
    """The parameters, in the model's own structure."""
    path = directory / PARAMS
    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except FileNotFoundError:
        raise InputError("EXPORT", str(directory), f"has no {PARAMS}: it is no export, or not whole.") from None
    except (SafetensorError, OSError, ValueError):
        raise InputError(str(path), "damaged", "is no whole safetensors file; get the export again.") from None
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        found = arrays.get(name)
        if found is None or found.shape != leaf.shape:
            there = "is missing" if found is None else f"has shape {found.shape}"
            remedy = (
                f"{name} {there}, but the model that {CONFIG} and {MODEL} describe has shape {leaf.shape}; they do not "
                "belong together, or the model is code that has changed since."
            )
            raise InputError(str(path), name, remedy)
    if extra := sorted(arrays.keys() - set(names)):
        remedy = f"the model that {CONFIG} and {MODEL} describe has no such parameter; they do not belong together."
        raise InputError(str(path), extra[0], remedy)
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])
