"""Functions of the user's own, named in a config as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpdist.config.nearest import did_you_mean
from dpdist.config.user_errors import users_code
from dpdist.errors import InputError


def load_function(path: str, field: str, builtin: Sequence[str]) -> Callable[..., Any]:
    """Import `module:function`, as `load_object` does.

    Raises:
        InputError: as `load_object`; or it is no function.
    """
    function = load_object(path, field, builtin)
    if not callable(function):
        raise InputError(field, path, f"{path.partition(':')[0]} has no function {path.partition(':')[2]}.")
    return function


def load_object(path: str, field: str, builtin: Sequence[str]) -> Any:
    """Import `module:object`; modules in the working directory are found too.

    Args:
        path: what the config says.
        field: the config field it stands in, for error messages.
        builtin: the names that would have needed no import, for error messages.

    Raises:
        InputError: not of that form, no such module or object, or the module fails to import; the error then says
            where, and no more than `dpdist.config.user_errors` allows.
    """
    module_name, function_name = split_function(path, field, builtin)
    here = find_modules_here()
    try:
        with users_code(field, path, slips_only=field == "data.source", quote=False):
            found = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:  # and no code of the user's has run
        raise InputError(
            field, path, f"cannot import {module_name}: {error}. Is it installed, or in {here}?"
        ) from error
    if found is None:
        raise InputError(field, path, f"{module_name} has no function {function_name}.")
    return found


def split_function(path: str, field: str, builtin: Sequence[str]) -> tuple[str, str]:
    """Module and function of `module:function`; the arguments are those of `load_function`.

    Raises:
        InputError: not of that form.
    """
    module_name, colon, function_name = path.partition(":")
    if not colon or not module_name or not function_name:
        meant = did_you_mean(path, builtin)
        raise InputError(field, path, f"{meant}give one of {', '.join(builtin)}, or module:function of your own.")
    return module_name, function_name


def find_modules_here() -> str:
    """Let modules in the working directory be found, after all others; that directory."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return here
