"""What a setting's value must be, written beside it: `learning_rate: Annotated[float, Positive()] = 1.0`.

A constraint is a frozen dataclass with a `remedy`, what an error tells the user to do, and words for the
documentation (`str`). `dpdist.config.section` applies them to every value that is given; None and a word that the
type names itself, such as `auto`, need no constraint.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

from dpdist.errors import InputError

#: Bytes of a file name that file systems take.
_LONGEST_NAME = 255


class Constraint(ABC):
    """A condition on one value."""

    #: What it can be asked of.
    takes: ClassVar[tuple[type, ...]] = (Real,)
    #: What to do instead, as a full sentence.
    remedy: str

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether `value`, one of `takes`, can be used."""

    @abstractmethod
    def __str__(self) -> str:
        """The condition in a few words; empty where there is nothing to say of it."""


@dataclass(frozen=True)
class Positive(Constraint):
    """A finite number above 0."""

    remedy: str = "give a positive, finite number."

    def holds(self, value: Any) -> bool:
        return math.isfinite(value) and value > 0

    def __str__(self) -> str:
        return "positive"


@dataclass(frozen=True)
class AtLeast(Constraint):
    """A number that is `least` or more."""

    least: int
    remedy: str = ""

    def __post_init__(self) -> None:
        default = f"give at least {self.least}." if self.least else "give 0 or more."
        object.__setattr__(self, "remedy", self.remedy or default)

    def holds(self, value: Any) -> bool:
        return value >= self.least

    def __str__(self) -> str:
        return f"at least {self.least}"


@dataclass(frozen=True)
class Between(Constraint):
    """A number in an interval, whose ends count where `closed` says so."""

    low: float
    high: float
    closed: Literal["neither", "left", "both"] = "neither"
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "remedy", self.remedy or f"give a number in {self}.")

    def holds(self, value: Any) -> bool:
        above = value > self.low if self.closed == "neither" else value >= self.low
        return above and (value <= self.high if self.closed == "both" else value < self.high)

    def __str__(self) -> str:
        left, right = "(" if self.closed == "neither" else "[", "]" if self.closed == "both" else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class NonEmpty(Constraint):
    """A text or a list with something in it."""

    takes: ClassVar[tuple[type, ...]] = (str, list, tuple, os.PathLike)
    remedy: str

    def holds(self, value: Any) -> bool:
        return bool(value)

    def __str__(self) -> str:
        return "not empty"


@dataclass(frozen=True)
class IsPath(Constraint):
    """A path, whose `~` is expanded as soon as it is given."""

    takes: ClassVar[tuple[type, ...]] = (str, os.PathLike)
    remedy: str = f"a name in a path has at most {_LONGEST_NAME} bytes, none of them 0; give another."

    def holds(self, value: Any) -> bool:
        names = os.fsencode(value).split(b"/")
        return all(len(name) <= _LONGEST_NAME and b"\0" not in name for name in names)

    def __str__(self) -> str:
        return "a path"


def expand_home(path: str | os.PathLike[str], field: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home directory; `./~` is a name like any other.

    Args:
        field: what the path was given as, for the error.

    Raises:
        InputError: the home directory is not known, or it is no path: a name in it is too long, say.
    """
    if not (rule := IsPath()).holds(path):
        raise InputError(field, path, rule.remedy)
    text = os.fspath(path)
    expanded = os.path.expanduser(text)  # noqa: PTH111, since Path would also drop a final slash
    if text.startswith("~") and expanded == text:
        raise InputError(field, path, "no home directory of that name is known; write the whole path.")
    return expanded
