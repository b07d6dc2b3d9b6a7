"""The space that candidates are drawn from: public, fixed before the first trial, and the same for every trial.

Candidates are drawn independently of each other and of the data, with replacement: two trials may be of one candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpdist.config import setting_names
from dpdist.config.file import parse
from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError
from dpdist.mechanism.keys import Secret

#: Settings, or sections that end in a dot, that no space may hold, and why.
_REFUSED = {
    "data.": "all trials must train on the same records and be tested on the same",
    "privacy.": "a trial's noise follows from what all may cost (privacy.clip_norm can be searched)",
    "run.": "it says where a run is",
    "checkpoint.": "it changes nothing that is learned",
    "cluster.": "it changes nothing that is learned",
    "model.task": "it decides what the metric means",
    "model.classes": "it decides what the metric means",
    "model.metrics": "it decides what the metric means",
}
_ALLOWED = ("privacy.clip_norm",)
_FORMS = "write a list of values, {uniform: [low, high]} or {log_uniform: [low, high]}"
#: No end of an interval is larger, either way.
_LARGEST = 1e308
#: Significant digits of a number that is drawn from an interval.
_DIGITS = 4


def uniform(secret: Secret, purpose: str, trial: int = 0) -> float:
    """A number in (0, 1) that whoever lacks the secret cannot tell from a random one; the same at every call."""
    number = int.from_bytes(secret.derive(purpose, step=trial, size=8), "little")
    return ((number >> 11) + 0.5) * 2.0**-53


@dataclass(frozen=True)
class Space:
    """Of each setting, by dotted name, a list of values or an interval, as the file has it."""

    axes: Mapping[str, Any]

    def draw(self, secret: Secret, trial: int) -> dict[str, Any]:
        """The settings of a trial, by its number from 0."""
        return {name: _value(axis, uniform(secret, f"candidate:{name}", trial)) for name, axis in self.axes.items()}

    def samples(self) -> Iterator[dict[str, Any]]:
        """Settings that show whether each value can be used: one axis at a time, over its list or its ends."""
        first = {name: _extent(axis)[0] for name, axis in self.axes.items()}
        for name, axis in self.axes.items():
            for value in _extent(axis):
                yield first | {name: value}


def read_space(path: Path) -> Space:
    """The space that a YAML file describes.

    Raises:
        InputError: the file cannot be read, or says what cannot be drawn from.
    """
    try:
        axes = parse(path.read_text())
    except FileNotFoundError:
        raise InputError("--space", str(path), "no such file; docs/tuning.md has an example.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("--space", str(path), f"cannot be read as YAML: {error}") from None
    if not isinstance(axes, dict) or not axes:
        raise InputError("--space", str(path), f"name at least one setting, such as optimizer.learning_rate; {_FORMS}.")
    for name, axis in axes.items():
        _require_setting(str(name), axis)
        _require_axis(str(name), axis)
    return Space({str(name): axis for name, axis in axes.items()})


def _require_setting(name: str, axis: Any) -> None:
    known = setting_names()
    if not any(name == setting or name.startswith(f"{setting}.") for setting in known):
        raise InputError("--space", name, f"no such setting; {did_you_mean(name, known)}`dpdist settings` lists all.")
    for refused, why in _REFUSED.items():
        inside = name.startswith(refused) if refused.endswith(".") else name.split(".")[:2] == refused.split(".")
        if inside and name not in _ALLOWED:
            raise InputError("--space", name, f"cannot be searched: {why}; set it in the config.")


def _require_axis(name: str, axis: Any) -> None:
    if isinstance(axis, list) and axis:
        return
    if isinstance(axis, dict) and len(axis) == 1 and (kind := next(iter(axis))) in ("uniform", "log_uniform"):
        ends = axis[kind]
        numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        least = 0 if kind == "log_uniform" else -_LARGEST
        if numbers and least <= ends[0] < ends[1] <= _LARGEST and (kind == "uniform" or ends[0] > 0):
            return
        above = " above 0" if kind == "log_uniform" else ""
        remedy = f"give two numbers{above}, the lower one first, none beyond {_LARGEST:g}."
        raise InputError("--space", f"{name}: {axis}", remedy)
    raise InputError("--space", f"{name}: {axis}", f"{_FORMS}.")


def _extent(axis: Any) -> list[Any]:
    return axis if isinstance(axis, list) else list(next(iter(axis.values())))


def _value(axis: Any, u: float) -> Any:
    """What stands at `u` in (0, 1) of an axis; an interval between two integers holds integers alone."""
    if isinstance(axis, list):
        return axis[int(u * len(axis))]
    ((kind, (low, high)),) = axis.items()
    whole = type(low) is int and type(high) is int
    below, above = (low - 0.5, high + 0.5) if whole else (low, high)
    if kind == "uniform":
        found = below * (1 - u) + above * u
    else:  # in logarithms, as the quotient of the ends may be larger than any float
        found = math.exp(math.log(below) * (1 - u) + math.log(above) * u)
    return min(max(round(found) if whole else float(f"{found:.{_DIGITS}g}"), low), high)
