"""How a run is started and looked at. `submit` sends one to a SLURM cluster, `attach` finds its job again.

`from launch import submit` is the door for scripts; where another package has that name, as ROS 2 does, it is
`from dpdist_launch import submit`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdist_launch.slurm.job import JobFailedError, TrainingJob, attach
    from dpdist_launch.slurm.submit import submit

__all__ = ["JobFailedError", "TrainingJob", "attach", "submit"]

# Resolved on first use: `dpdist` commands that submit nothing do not wait for submitit.
_HOME = {
    "JobFailedError": "dpdist_launch.slurm.job",
    "TrainingJob": "dpdist_launch.slurm.job",
    "attach": "dpdist_launch.slurm.job",
    "submit": "dpdist_launch.slurm.submit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
