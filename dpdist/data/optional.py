"""Libraries that only some sources need: imported when one of these is opened, with a remedy where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from dpdist.errors import InputError

#: The extra of dpdist that brings a library, by the module's name.
EXTRAS = {"PIL.Image": "images", "pyarrow": "parquet", "datasets": "hf", "tokenizers": "text"}


def load(module: str, needed_by: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: one of `EXTRAS`, or a module of the same library, such as `pyarrow.parquet`.
        needed_by: the source, or what is read, for the error.

    Raises:
        InputError: the library is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = next(extra for known, extra in EXTRAS.items() if known.split(".")[0] == module.split(".")[0])
        raise InputError(
            "data.source", needed_by, f"needs {module.split('.')[0]} ({error}); pip install 'dpdist[{extra}]'."
        ) from None
