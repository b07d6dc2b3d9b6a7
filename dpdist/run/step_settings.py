"""The settings that a step depends on: with another value of one of these a run begins a new incarnation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: Settings, or sections that end in a dot, that may change within an incarnation: nothing here alters a sample, a draw
#: or an update beyond the order of summation.
MAY_CHANGE = (
    "run.",
    "checkpoint.",
    "cluster.",
    "data.workers",
    "data.worker_processes",
    "data.prefetch",
    "data.path",
    "sampling.assignment",
    "training.physical_batch_size",
    "training.evaluate_every",
    "training.evaluation_batch_size",
    "training.record_digests",
    "training.profile",
)


def step_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a step depends on, by dotted name: all but `MAY_CHANGE`."""
    return {name: value for name, value in settings.items() if {name, name.split(".")[0] + "."}.isdisjoint(MAY_CHANGE)}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 over `step_settings`."""
    return hashlib.sha256(json.dumps(step_settings(settings), sort_keys=True).encode()).hexdigest()
