"""Configs as files: one YAML file, `section.key=value` overrides, and the resolved copy a run keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from dpdist.config import SECTIONS, Config, from_dict, setting_names, to_dict
from dpdist.config.constraints import expand_home
from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError


class Yaml(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, only true and false are truth values, `off` and a date are words."""


class YamlDumper(yaml.SafeDumper):
    """Writes what `Yaml` reads back: it quotes a string that looks like a number to that."""


# To the end, `$`: PyYAML asks for a match at the beginning alone.
_BOOL = re.compile(r"(true|false|True|False)$")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
)
for _kind in (Yaml, YamlDumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tfTF"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class GivenTwiceError(yaml.YAMLError):
    """A key stands twice in one mapping; YAML's own readers let the last one win in silence."""


def parse(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is no YAML.
        GivenTwiceError: a key stands twice, which names it and both lines.
    """
    loader = Yaml(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_each_key_once(node, "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _require_each_key_once(node: yaml.Node, prefix: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias may lead back to where it stands
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_each_key_once(item, prefix, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if (first := lines.get((key.tag, key.value))) is not None:
                    raise GivenTwiceError(f"{name} is given twice, on lines {first} and {line}")
                lines[key.tag, key.value] = line
            _require_each_key_once(value, f"{name}.", seen)


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    default_run_dir: str | None = None,
) -> Config:
    """Read a YAML config and apply `section.key=value` overrides, whose values are YAML too, and then settings.

    `run.dir` defaults to `runs/` and the file's name. Of two overrides of one setting the later one counts.

    Args:
        settings: values by dotted name, as Python has them; a path may be a `Path`.
        default_run_dir: instead of `runs/` and the file's name.

    Raises:
        InputError: the file cannot be read, or something in it cannot be used.
    """
    path = Path(expand_home(path, "CONFIG"))
    tree = apply_overrides(read(path), overrides)
    for name, value in settings.items():
        _set(tree, str(name), _plain(str(name), value), shown=value)
    if isinstance(tree.setdefault("run", {}), dict):
        tree["run"].setdefault("dir", default_run_dir or f"runs/{path.stem}")
    return from_dict(tree)


def read(path: Path) -> dict[str, Any]:
    """The sections of a YAML config as plain dicts.

    Raises:
        InputError: there is no such file, it is no YAML of sections, or a section or key stands in it twice.
    """
    try:
        tree = parse(path.read_text()) or {}
    except FileNotFoundError:
        raise InputError("CONFIG", str(path), "no such file; see configs/ for examples.") from None
    except GivenTwiceError as error:
        raise InputError("CONFIG", str(path), f"{error}; keep one of them.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("CONFIG", str(path), f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError("CONFIG", str(path), "a config holds sections, such as `privacy:`.")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with each `section.key=value` set, the later over the earlier; deeper keys reach into `options`.

    Raises:
        InputError: an override is not of that form, or reaches into a value.
    """
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise _no_override(name, item)
        try:
            value = parse(text)
        except GivenTwiceError as error:
            raise InputError(name, text, f"{error}; keep one of them.") from None
        except yaml.YAMLError:
            raise InputError(name, text, "the value is not YAML; quote it.") from None
        _set(tree, name, value, shown=text)
    return tree


def _set(tree: dict[str, Any], name: str, value: Any, *, shown: Any) -> None:
    """Put a value at a dotted name, which an error shows as `shown`."""
    path = name.strip().split(".")
    if len(path) < 2 or not all(path):
        raise _no_override(name, f"{name}={shown}")
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise InputError(name, shown, f"{key} holds a value, not keys.")
    node[path[-1]] = value


def _no_override(name: str, item: str) -> InputError:
    remedy = f"{_meant_by(name.strip())}write section.key=value, such as privacy.clip_norm=0.5."
    return InputError("override", item, remedy)


def _plain(name: str, value: Any) -> Any:
    """A value as a YAML file could hold it: a path becomes text, a tuple a list.

    Raises:
        InputError: there is something in it that no file can hold.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {key: _plain(name, item) for key, item in value.items()}
    given = "a function" if callable(value) else f"a {type(value).__name__}"
    remedy = f"a config cannot hold {given}; give text, numbers, lists or dicts, and a function as 'module:function'."
    raise InputError(name, value, remedy)


def _meant_by(name: str) -> str:
    """The hint about an override that has no section, or is no setting."""
    if name in SECTIONS or name in setting_names():
        return ""
    exact = [full for full in setting_names() if full.partition(".")[2] == name]
    return f"did you mean {' or '.join(exact)}? " if exact else did_you_mean(name, setting_names())


def dump(config: Config) -> str:
    """The config as YAML, every default filled in; `load` reads it back."""
    return yaml.dump(to_dict(config), Dumper=YamlDumper, sort_keys=False)
