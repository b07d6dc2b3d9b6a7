"""Which files the modules of the user's own are made of and which libraries they use, found without running any."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from dpdist.config.nearest import did_you_mean
from dpdist.config.plugins import split_function
from dpdist.errors import InputError


def module_sources(modules: Collection[str]) -> dict[str, Path]:
    """The source files of modules and of all that they import, by module name, in order of name; none is run.

    Left out are libraries that are installed, dpdist itself, and what is imported under a name made at run time.
    """
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


def require_function(path: str, field: str, builtin: Sequence[str]) -> None:
    """Check that `dpdist.config.plugins.load_function` will find `module:function`, without running any of it.

    What cannot be told without running it, such as a name that the module makes by `globals()`, is taken to be there.

    Raises:
        InputError: not of that form, no such module or function, or what the user's own modules import is not there.
    """
    module, function = split_function(path, field, builtin)
    where = f"Is it installed, or in {Path.cwd()}?"
    if _find_spec(module) is None:
        raise InputError(field, path, f"there is no module {module}. {where}")
    if _is_installed(module):
        return
    sources = module_sources([module])
    for file in sources.values():
        try:
            body = ast.parse(file.read_bytes()).body
        except (SyntaxError, ValueError) as error:
            if file.suffix == ".py":
                raise InputError(field, path, f"{file} cannot be read: {error}.") from None
            return  # an extension module
        for name in _imported_at_once(body):
            if _find_spec(name) is None:
                raise InputError(field, path, f"{file} imports {name}, which is not there. {where}")
        if file == sources.get(module) and (bound := _bound_by(body)) is not None and function not in bound:
            hint = did_you_mean(function, bound)
            raise InputError(field, path, f"{hint}{module} ({file}) has no function {function}.")


def _imported_at_once(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The packages that a module imports whatever happens, by absolute name; not those in a `try` or an `if`."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _bound_by(body: Sequence[ast.stmt]) -> set[str] | None:
    """The names that a module binds at its top level; None where that cannot be told without running it."""
    bound: set[str] = set()
    for statement in body:
        for node in _outside_functions(statement):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if node.name == "__getattr__":
                    return None
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.Name) and node.id in ("globals", "exec", "setattr", "vars"):
                return None
    return None if "*" in bound or any(isinstance(n, ast.Global) for s in body for n in ast.walk(s)) else bound


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but not what is within a function, a lambda or a class."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


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
    """As `importlib.util.find_spec`, but without running the packages that the module is in.

    Modules of the working directory are found too, after all others, as `load_function` does.
    """
    spec, locations = None, None
    for prefix in [*sorted(_parents(name), key=len), name]:
        specs = (finder.find_spec(prefix, locations) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((each for each in specs if each is not None), None)
        if spec is None and locations is None:
            spec = PathFinder.find_spec(prefix, [str(Path.cwd())])
        locations = spec.submodule_search_locations if spec is not None else None
        if prefix != name and locations is None:
            return None
    return spec
