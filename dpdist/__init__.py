"""dpdist: distributed differentially private training (DP-SGD) in JAX.

`train(config)` runs a `Config` to its end, `load(directory)` brings back what a run has trained, from its directory or
an export, and `open_dataset(config)` gives the train and test examples as training sees them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdist.config import Config, from_dict
    from dpdist.config.file import load as load_config
    from dpdist.data import open_dataset
    from dpdist.errors import InputError
    from dpdist.release.trained import TrainedRun
    from dpdist.release.trained_run import load
    from dpdist.trainer import train

    __version__: str

__all__ = ["Config", "InputError", "TrainedRun", "from_dict", "load", "load_config", "open_dataset", "train"]

# Resolved on first use, so that `dpdist privacy` and the launchers do not wait for JAX to import.
_HOME = {
    "Config": ("dpdist.config", "Config"),
    "InputError": ("dpdist.errors", "InputError"),
    "TrainedRun": ("dpdist.release.trained", "TrainedRun"),
    "from_dict": ("dpdist.config", "from_dict"),
    "load": ("dpdist.release.trained_run", "load"),
    "load_config": ("dpdist.config.file", "load"),
    "open_dataset": ("dpdist.data", "open_dataset"),
    "train": ("dpdist.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'dpdist' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def _version() -> str:
    """The version of the installed package, or the one in pyproject.toml where the source is run as it lies."""
    from importlib import metadata

    try:
        return metadata.version("dpdist")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
        return str(tomllib.loads(text)["project"]["version"])
