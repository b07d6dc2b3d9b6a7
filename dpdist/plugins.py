"""Functions of the user's own, named in a config as `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpdist.errors import InputError


def load_function(path: str, field: str, builtin: Sequence[str]) -> Callable[..., Any]:
    """Import `module:function`; modules in the working directory are found too.

    Args:
        path: what the config says.
        field: the config field it stands in, for error messages.
        builtin: the names that would have needed no import, for error messages.

    Raises:
        InputError: not of that form, no such module or function, or the module fails to import.
    """
    module_name, colon, function_name = path.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(field, path, f"give one of {', '.join(builtin)}, or module:function of your own.")
    here = _find_modules_here()
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise InputError(
            field, path, f"cannot import {module_name}: {error}. Is it installed, or in {here}?"
        ) from error
    if not callable(function):
        raise InputError(field, path, f"{module_name} has no function {function_name}.")
    return function


def module_file(module_name: str) -> Path | None:
    """The source file of a module, without importing it; None where there is none."""
    _find_modules_here()
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _find_modules_here() -> str:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return here
