"""Configs as nested dicts: from what was read to a `Config`, and back.

draccus decodes, chosen over jsonargparse and tyro because it turns dicts into dataclasses without owning the command
line, and its errors carry the dotted path of the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import draccus

from dpdist.config.nearest import did_you_mean, nearest
from dpdist.config.schema import SECTIONS, Config
from dpdist.config.section import fields_of, wrong_value
from dpdist.errors import InputError


def from_dict(tree: Mapping[str, Any]) -> Config:
    """A `Config` from nested dicts.

    Raises:
        InputError: a section or key that there is not, a wrong type, or a value that cannot be used.
    """
    for section, values in tree.items():
        if section not in SECTIONS:
            meant = did_you_mean(section, SECTIONS)
            raise InputError(str(section), values, f"no such section; {meant}the sections are {', '.join(SECTIONS)}.")
        if not isinstance(values, Mapping):
            raise InputError(section, values, "a section holds `key: value` lines.")
        known = fields_of(SECTIONS[section])
        for key, value in values.items():
            if key not in known:
                meant = _meant_by(section, key)
                raise InputError(f"{section}.{key}", value, f"no such key; {meant}{section} has {', '.join(known)}.")
            allowed = known[key].alternatives
            if (isinstance(value, bool) and bool not in allowed) or (value is None and type(None) not in allowed):
                raise wrong_value(f"{section}.{key}", value, known[key])
    try:
        return draccus.decode(Config, {k: dict(v) for k, v in tree.items()})
    except draccus.utils.DecodingError as error:
        section, key = (str(k) for k in error.key_path[:2])
        raise wrong_value(f"{section}.{key}", tree[section][key], fields_of(SECTIONS[section])[key]) from None
    except draccus.utils.ParsingError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError("config", "null", f"a value is missing: {error.__cause__ or error}.") from None


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The nested dicts of a config, every default filled in."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """`{"privacy.delta": 1e-05, ...}`, every field by its dotted name."""
    return {f"{section}.{key}": value for section, values in to_dict(config).items() for key, value in values.items()}


def setting_names() -> list[str]:
    """The dotted names of all settings, in the order of the sections."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in fields_of(section)]


def _meant_by(section: str, key: object) -> str:
    """The hint about an unknown key: its like in the same section, or the same key in another."""
    near = nearest(key, fields_of(SECTIONS[section]))
    elsewhere = [name for name in setting_names() if name.partition(".")[2] == key]
    names = [f"{section}.{near}"] if near is not None else elsewhere
    return f"did you mean {' or '.join(names)}? " if names else ""
