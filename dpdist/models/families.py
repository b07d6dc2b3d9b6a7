"""Families of published models: what their `config.json` says, read beside the weights and written beside an export.

Weights alone do not tell everything: another number of heads, or another epsilon, loads without complaint and
computes another function.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config.lora import ATTENTION
from dpdist.errors import InputError
from dpdist.models.pretrained import FIELD

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A built-in model's counterparts in `transformers`, as their config.json describes them."""

    #: Its `model_type`; the first is that of an export.
    model_types: tuple[str, ...]
    #: The class in `transformers` that has the same outputs.
    architecture: str
    #: Our option -> its key in config.json. An option that is given must equal what the file says.
    keys: dict[str, str]
    #: The same for options of which another value can be computed with the same weights.
    suggested: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Key -> the values that our model computes; the first is that of an export.
    fixed: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    #: Our variants' sizes, by name.
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    #: Changes what the file says where no table can, before the tables are applied.
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: said
    #: Spells out what an option that is None stands for; the inverse of what `prepare` does is `finish`.
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: options
    finish: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda said, options: said
    #: What `timm`'s config.json says -> our options, or None if its `architecture` is not of this family.
    timm_options: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda said: None
    #: Patterns of the kernels that `model.lora` adapts where it names none.
    adapted: tuple[str, ...] = ATTENTION


def modules() -> dict[str, Any]:
    """The modules of the families, by the name of our model."""
    from dpdist.models import bert, gpt2, llama, resnet, vit

    return {"bert": bert, "gpt2": gpt2, "llama": llama, "bit_resnet": resnet, "vit": vit}


def family_of(name: str) -> Family | None:
    """The family of a model's name, if it is of one."""
    module = modules().get(name)
    return None if module is None else module.FAMILY


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model of a family with everything that is left out: defaults and the variant's sizes."""
    module = modules()[name]
    parameters = inspect.signature(getattr(module, name)).parameters
    defaults = {key: each.default for key, each in parameters.items() if each.default is not inspect.Parameter.empty}
    given = {key: value for key, value in options.items() if value is not None}
    of_variant = module.FAMILY.variants.get((defaults | given).get("variant", ""), {})
    return module.FAMILY.complete(defaults | dict(of_variant) | given)


def settled(chosen: config_module.Model) -> config_module.Model:
    """Take the sizes that `model.options` leaves out from the `config.json` beside the pretrained weights.

    A run keeps what this returns, so that a finished run is loaded without the weights. Where there is no such file,
    `chosen` is returned as it is.

    Raises:
        InputError: the file is damaged, belongs to another model, asks for what our model does not compute, or
            contradicts an option.
    """
    family, weights = family_of(chosen.name), chosen.options.get("pretrained")
    if family is None or not isinstance(weights, str):
        return chosen
    path = Path(weights).expanduser()
    if not path.exists():
        return chosen
    path = (path if path.is_dir() else path.parent) / CONFIG
    if not path.is_file():
        return chosen
    given = {name: value for name, value in chosen.options.items() if value is not None}
    of_variant = dict(family.variants.get(given.get("variant", ""), {}))
    said = _options(family, chosen.name, path)
    for name, value in said.items():
        for source, known in (("", given), (f" (of variant {given.get('variant')})", of_variant)):
            if name in known and known[name] != value and name not in family.suggested:
                raise InputError(
                    f"model.options.{name}",
                    known[name],
                    f"{path} says {value!r}{_key(family, name)}{source and ', not' + source}; leave the option out to "
                    "take what the file says, or give the weights of such a model.",
                )
    return dataclasses.replace(chosen, options=said | given)


def _key(family: Family, name: str) -> str:
    key = (family.keys | family.suggested).get(name)
    return f" ({key})" if key else ""


def _options(family: Family, name: str, path: Path) -> dict[str, Any]:
    """Our options that the config.json at `path` sets."""
    try:
        said = json.loads(path.read_text())
        if not isinstance(said, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(FIELD, str(path), f"is no JSON object ({error}); fetch it again.") from None
    if "model_type" not in said and isinstance(said.get("architecture"), str):
        options = family.timm_options(said)
        if options is None:
            raise InputError(FIELD, str(path), f"is of timm's {said['architecture']!r}, which {name} does not compute.")
        return options
    if said.get("model_type") not in family.model_types:
        raise InputError(
            FIELD,
            str(path),
            f"is of model_type {said.get('model_type')!r}; {name} reads {' and '.join(family.model_types) or 'none'}.",
        )
    said = family.prepare(said)
    for key, values in family.fixed.items():
        if key in said and said[key] not in values:
            raise InputError(
                FIELD,
                str(path),
                f"has {key}: {said[key]!r}, which {name} does not compute; only {' or '.join(map(repr, values))}.",
            )
    keys = family.keys | family.suggested
    return {option: said[key] for option, key in keys.items() if said.get(key) is not None}


def completed(variants: Mapping[str, Mapping[str, Any]], variant: str, **given: Any) -> dict[str, Any]:
    """Return the sizes of a variant, with those of `given` that are not None in their place.

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in variants:
        raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(variants)}")
    return dict(variants[variant]) | {name: value for name, value in given.items() if value is not None}
