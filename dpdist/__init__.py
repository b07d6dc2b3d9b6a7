"""dpdist: distributed differentially private training (DP-SGD) in JAX.

`train(config)` runs a `Config` to its end, `load(run_dir)` brings back what a run has trained.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdist.config import Config, from_dict
    from dpdist.configfile import load as load_config
    from dpdist.errors import InputError
    from dpdist.release import TrainedRun, load
    from dpdist.train import train

__all__ = ["Config", "InputError", "TrainedRun", "from_dict", "load", "load_config", "train"]

# Resolved on first use, so that `dpdist privacy` and the launchers do not wait for JAX to import.
_HOME = {
    "Config": ("dpdist.config", "Config"),
    "InputError": ("dpdist.errors", "InputError"),
    "TrainedRun": ("dpdist.release", "TrainedRun"),
    "from_dict": ("dpdist.config", "from_dict"),
    "load": ("dpdist.release", "load"),
    "load_config": ("dpdist.configfile", "load"),
    "train": ("dpdist.train", "train"),
}


class _Facade(types.ModuleType):
    """This package. Importing the module `dpdist.train` binds it to the name of its function: the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.train if name == "train" and isinstance(value, types.ModuleType) else value)


sys.modules[__name__].__class__ = _Facade


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpdist' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
