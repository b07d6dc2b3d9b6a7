"""The metric that trials are compared by: chosen before the first of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpdist import config as config_module
from dpdist.errors import InputError
from dpdist.models.tasks import METRICS, task_of

_LOWEST_IS_BEST = frozenset({"loss", "mse", "mae", "perplexity"})


@dataclass(frozen=True)
class Metric:
    """A test metric by name, and whether the highest or the lowest value is best."""

    name: str
    highest: bool

    def score(self, metrics: dict[str, Any]) -> float | None:
        """A number that is larger the better; None for what is missing, not finite or not defined."""
        value = metrics.get(self.name)
        if value is None or not math.isfinite(value):
            return None
        return float(value) if self.highest else -float(value)

    def to_record(self) -> dict[str, str]:
        """For `search.json` and the statement."""
        return {"name": self.name, "best": "highest" if self.highest else "lowest"}


def choose_metric(model: config_module.Model, *, maximize: str | None, minimize: str | None) -> Metric:
    """The metric that was asked for, or the one that the model's task is usually judged by.

    Raises:
        InputError: the task has no such metric, or which of its values are good is not known.
    """
    task, own = task_of(model), set(model.metrics)
    for option, name in (("--maximize", maximize), ("--minimize", minimize)):
        if name is not None:
            if task.name in TASK_METRICS and name not in (known := TASK_METRICS[task.name] | {"loss"} | own):
                raise InputError(option, name, f"{task.name} has {', '.join(sorted(known))}.")
            return Metric(name, highest=option == "--maximize")
    if task.primary not in METRICS:
        raise InputError("--maximize", None, f"say which values of {task.primary} are good: --maximize or --minimize.")
    return Metric(task.primary, highest=task.primary not in _LOWEST_IS_BEST)


#: The metrics that the tasks here measure beside the loss.
TASK_METRICS = {
    "classification": {"accuracy", "auroc"},
    "binary": {"accuracy", "auroc"},
    "multilabel": {"accuracy", "auroc"},
    "regression": {"mse", "mae", "r2"},
    "language_modeling": {"perplexity", "token_accuracy"},
    "none": set[str](),
}
