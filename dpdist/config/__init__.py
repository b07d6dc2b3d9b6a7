"""What a user gives: the typed settings of a run, read from YAML, and the functions of their own that it names."""

from __future__ import annotations

from dpdist.config.schema import (
    SECTIONS,
    Checkpoint,
    Cluster,
    Config,
    Data,
    Model,
    Optimizer,
    Privacy,
    Run,
    Sampling,
    Training,
)
from dpdist.config.tree import flatten, from_dict, setting_names, to_dict

__all__ = [
    "SECTIONS",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Model",
    "Optimizer",
    "Privacy",
    "Run",
    "Sampling",
    "Training",
    "flatten",
    "from_dict",
    "setting_names",
    "to_dict",
]
