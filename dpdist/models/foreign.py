"""A trained model as a checkpoint of `transformers` or `timm`: their tensors' names, and the config they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpdist import config as config_module
from dpdist.errors import InputError
from dpdist.models.families import CONFIG, Family, complete_options, family_of, modules
from dpdist.models.pretrained import Naming, written

#: The libraries, and our models that each can load.
LIBRARIES = {"transformers": ("gpt2", "llama", "bert", "vit"), "timm": ("vit", "bit_resnet")}
#: Models that generate, and so need to know where to stop.
LANGUAGE_MODELS = ("gpt2", "llama")
PREPROCESSOR = "preprocessor_config.json"
#: `transformers`' name of the loss that a task of ours has.
_PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


def checkpoint(
    chosen: config_module.Model,
    params: Any,
    library: str,
    *,
    class_names: Sequence[str] | None = None,
    tokens: Mapping[str, int | list[int]] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Return the tensors of `model.safetensors` by name, and the JSON files beside it by name.

    Args:
        chosen: the `model` section of the run, whose options are settled.
        params: parameters without LoRA factors.
        library: `transformers` or `timm`.
        class_names: in the order of their numbers; None where they have none.
        tokens: what a language model's special tokens are, by the keys of `transformers`, as far as that is known.

    Raises:
        InputError: there is no such library, or it has no such model.
    """
    if library not in LIBRARIES:
        raise InputError("--as", library, f"give one of {', '.join(LIBRARIES)}.")
    family = family_of(chosen.name)
    if family is None or chosen.name not in LIBRARIES[library]:
        raise InputError(
            "--as", library, f"it has no counterpart of {chosen.name}, but of {', '.join(LIBRARIES[library])}."
        )
    options = complete_options(chosen.name, chosen.options)
    if chosen.name == "vit":
        options["channels"] = params["embed"]["kernel"].shape[0] // options["patch"] ** 2
    classes = int(params["head"]["bias"].size) if "head" in params else None
    # Both libraries look classes up by name, so that two of one name would be one.
    names = list(map(str, class_names or ()))
    named = names if len(set(names)) == classes else None
    if library == "transformers":
        files = _transformers_files(chosen, family, options, classes, named)
        if chosen.name in LANGUAGE_MODELS:
            files[CONFIG] |= dict(tokens or {})
    else:
        files = _timm_files(chosen, family, options, classes)
        files[CONFIG] |= {} if named is None else {"label_names": named}
    return written(params, _naming(chosen.name, library, options)), files


def _naming(name: str, library: str, options: dict[str, Any]) -> Naming:
    module = modules()[name]
    if name == "vit":
        names = module.naming if library == "transformers" else module.timm_naming
        return names(options["depth"], options["patch"], options["channels"])
    if name == "bit_resnet":
        return module.naming(options["layers"])
    return module.naming(options["depth"], *([options["tied"]] if name == "llama" else []))


def _transformers_files(
    chosen: config_module.Model, family: Family, options: dict[str, Any], classes: int | None, names: list[str] | None
) -> dict[str, dict[str, Any]]:
    said: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    said |= {key: values[0] for key, values in family.fixed.items()}
    said |= {key: options[option] for option, key in (family.keys | family.suggested).items()}
    said |= {"dtype": "float32"}
    if classes is not None:
        labels = {name: i for i, name in enumerate(names or [f"LABEL_{i}" for i in range(classes)])}
        said |= {"id2label": {str(i): label for label, i in labels.items()}, "label2id": labels}
        if (task := chosen.task or "classification") in _PROBLEMS:
            said |= {"problem_type": _PROBLEMS[task]}
    files = {CONFIG: family.finish(said, options)}
    if chosen.name == "vit":
        mean, deviation = _normalisation(options)
        files[CONFIG] |= {"num_channels": options["channels"]}
        files[PREPROCESSOR] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": options["image_size"], "width": options["image_size"]},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": deviation,
        }
    return files


def _timm_files(
    chosen: config_module.Model, family: Family, options: dict[str, Any], classes: int | None
) -> dict[str, dict[str, Any]]:
    make = _timm_vit if chosen.name == "vit" else _timm_bit
    said = make(options) | {"num_classes": classes}
    mean, deviation = _normalisation(options)
    size = options["image_size"]
    said["pretrained_cfg"] = {
        "num_classes": classes,
        "input_size": [options.get("channels", 3) if chosen.name == "vit" else 3, size, size],
        "fixed_input_size": chosen.name == "vit",
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": mean,
        "std": deviation,
    }
    return {CONFIG: said}


def _timm_vit(options: dict[str, Any]) -> dict[str, Any]:
    from dpdist.models.vit import TIMM_ARGUMENTS

    width, inner = options["width"], options["mlp"]
    exact = int(width * (inner / width)) == inner  # timm rounds the product down
    return {
        "architecture": "vit_base_patch16_224",
        "num_features": width,
        "model_args": {theirs: options[ours] for ours, theirs in TIMM_ARGUMENTS.items()}
        | {"in_chans": options["channels"], "mlp_ratio": (inner if exact else inner + 0.5) / width},
    }


def _timm_bit(options: dict[str, Any]) -> dict[str, Any]:
    from dpdist.models.resnet import VARIANTS

    sizes = {name: list(options[name]) for name in ("layers", "channels")}
    for variant, published in VARIANTS.items():
        if published == sizes:
            return {"architecture": f"resnetv2_{variant}_bit", "num_features": sizes["channels"][-1]}
    raise InputError("--as", "timm", f"it has no BiT of layers {sizes['layers']} and channels {sizes['channels']}.")


def _normalisation(options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of images in [0, 1], by channel, that our offset and scale stand for."""
    channels = options.get("channels", 3)
    channels = channels if isinstance(channels, int) else 3  # a BiT's are those of its stages
    return [options["offset"] / 255] * channels, [options["scale"] / 255] * channels
