"""What a registry says, for its owner: which datasets there are, and what was spent on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.joint.registry import Registry


def datasets(folder: Path) -> Sequence[str]:
    """The names of all registries in a directory.

    Raises:
        InputError: there is none.
    """
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not names:
        raise InputError("DIR", str(folder), "holds no registry; --create NAME makes one.")
    return names


def standing(folder: Path, dataset: str) -> dict[str, Any]:
    """What was spent on one dataset, as JSON."""
    registry = Registry(folder, dataset)
    cost, budget = registry.cost(), registry.budget
    return {
        "dataset": dataset,
        "epsilon": cost,
        "delta": registry.delta,
        "order": registry.order,
        "budget": budget,
        "left": None if budget is None else max(0.0, budget - cost),
        "runs": [
            {
                "run_dir": run.run_dir,
                "epsilon": run.charges.alone().epsilon,
                "delta": run.delta,
                "steps": sum(phase.steps for phase in run.incarnations.values()),
                "dataset_size": run.dataset_size,
                "unit": run.unit,
                "records_per_unit": run.records_per_unit,
            }
            for run in registry.runs.values()
        ],
        "torn": registry.torn,
    }
