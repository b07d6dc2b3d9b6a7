"""Which files the modules of the user's own are made of and which libraries they use, found without running any."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Collection
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from dpdist.config.plugins import find_modules_here


def module_sources(modules: Collection[str]) -> dict[str, Path]:
    """The source files of modules and of all that they import, by module name, in order of name; none is run.

    Left out are libraries that are installed, dpdist itself, and what is imported under a name made at run time.
    """
    find_modules_here()
    found: dict[str, Path] = {}
    wanted = set(modules)
    while wanted:
        name = wanted.pop()
        spec = _find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        found[name] = Path(spec.origin)
        package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        imported = _imported_by(found[name], package)
        wanted |= {each for each in imported | _parents(name) if each not in found and not _is_installed(each)}
    return dict(sorted(found.items()))


def library_versions(modules: Collection[str]) -> dict[str, str]:
    """The versions of the installed libraries that modules, or what they import of the user's own, import; by name.

    A library that only another library imports is not among them.
    """
    imported = set(modules)
    for name, file in module_sources(modules).items():
        imported |= _imported_by(file, name)
    tops = {name.partition(".")[0] for name in imported} - {"dpdist", "launch"}
    known = metadata.packages_distributions() if tops else {}
    found = {library for top in tops for library in known.get(top, ())}
    return {library: metadata.version(library) for library in sorted(found)}


def _imported_by(file: Path, package: str) -> set[str]:
    """Names of modules that a file of `package` may import, and of their parents."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # an extension module, or one that will fail by itself
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            levels = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*levels, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}  # which may be modules
    names = {name for name in names if all(name.split("."))}  # not what a script imports relative to no package
    return names | {parent for name in names for parent in _parents(name)}


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def _is_installed(name: str) -> bool:
    """Whether a module belongs to Python, an installed library or dpdist; True also for what isn't there."""
    top = name.partition(".")[0]
    spec = _find_spec(top) if top not in ("dpdist", "launch") else None
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec is not None else []
    return all(place is None or _is_library(Path(place)) for place in places)


def _is_library(place: Path) -> bool:
    python = Path(sysconfig.get_path("stdlib"))
    return place.is_relative_to(python) or bool({"site-packages", "dist-packages"} & set(place.parts))


def _find_spec(name: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, but without running the packages that the module is in."""
    spec, locations = None, None
    for prefix in [*sorted(_parents(name), key=len), name]:
        specs = (finder.find_spec(prefix, locations) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((each for each in specs if each is not None), None)
        locations = spec.submodule_search_locations if spec is not None else None
        if prefix != name and locations is None:
            return None
    return spec
