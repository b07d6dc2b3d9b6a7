"""Configs as files: one YAML file, `section.key=value` overrides, and the resolved copy a run keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dpdist.config import Config, from_dict, to_dict
from dpdist.errors import InputError


class Yaml(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and only true and false are truth values (off is a word)."""


class YamlDumper(yaml.SafeDumper):
    """Writes what `Yaml` reads back: it quotes a string that looks like a number to that."""


_BOOL = re.compile(r"true|false|True|False")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)"
)
for _kind in (Yaml, YamlDumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tfTF"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides, whose values are YAML too.

    `run.dir` defaults to `runs/` and the file's name.

    Raises:
        InputError: the file cannot be read, or something in it cannot be used.
    """
    path = Path(path)
    tree = apply_overrides(read(path), overrides)
    if isinstance(tree.setdefault("run", {}), dict):
        tree["run"].setdefault("dir", f"runs/{path.stem}")
    return from_dict(tree)


def read(path: Path) -> dict[str, Any]:
    """The sections of a YAML config as plain dicts."""
    try:
        tree = yaml.load(path.read_text(), Loader=Yaml) or {}
    except FileNotFoundError:
        raise InputError("CONFIG", str(path), "no such file; see configs/ for examples.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("CONFIG", str(path), f"cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError("CONFIG", str(path), "a config holds sections, such as `privacy:`.")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with each `section.key=value` set; deeper keys reach into `options`."""
    for item in overrides:
        name, equals, text = item.partition("=")
        path = name.strip().split(".")
        if not equals or len(path) < 2 or not all(path):
            raise InputError("override", item, "write section.key=value, such as privacy.clip_norm=0.5.")
        try:
            value = yaml.load(text, Loader=Yaml)
        except yaml.YAMLError:
            raise InputError(name, text, "the value is not YAML; quote it.") from None
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InputError(name, text, f"{key} holds a value, not keys.")
        node[path[-1]] = value
    return tree


def dump(config: Config) -> str:
    """The config as YAML, every default filled in; `load` reads it back."""
    return yaml.dump(to_dict(config), Dumper=YamlDumper, sort_keys=False)
