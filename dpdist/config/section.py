"""A section of the config: what every field says of itself, and the one function that checks all of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from dpdist.config.constraints import Constraint, IsPath, expand_home
from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError


class Section:
    """A group of settings; its subclasses are frozen dataclasses whose fields are commented with `#:`."""

    def __post_init__(self) -> None:
        check_each(self)
        self.check_together()

    def check_together(self) -> None:
        """Check what concerns several settings of the section.

        Raises:
            InputError: they contradict each other.
        """

    def require(self, name: str, ok: bool, remedy: str) -> None:
        """Raise `InputError` about the setting `name` unless `ok`."""
        if not ok:
            raise InputError(f"{_section_name(self)}.{name}", getattr(self, name), remedy)


@dataclass(frozen=True, kw_only=True)
class Field:
    """What the source says of one field."""

    #: The type, without its constraints.
    kind: Any
    constraints: tuple[Constraint, ...]
    #: The value where none is given.
    default: Any

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types of a union, or the one type."""
        union = typing.get_origin(self.kind) in (Union, types.UnionType)
        return typing.get_args(self.kind) if union else (self.kind,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the type names, such as `auto`."""
        literals = [each for each in self.alternatives if typing.get_origin(each) is Literal]
        return tuple(word for each in literals for word in typing.get_args(each))

    @property
    def only_choices(self) -> bool:
        """Whether the type names every value there is."""
        return all(typing.get_origin(each) is Literal for each in self.alternatives)

    @property
    def type_name(self) -> str:
        """The type as a user reads it: `float or null`, `int or auto`, `sgd, adam or adamw`, `list of str`."""
        plain = [
            each for each in self.alternatives if each is not type(None) and typing.get_origin(each) is not Literal
        ]
        names = [*map(_name, plain), *self.choices, *(["null"] if type(None) in self.alternatives else [])]
        return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@functools.cache
def fields_of(section: type) -> dict[str, Field]:
    """The fields of a section by name, in their order."""
    hints, found = typing.get_type_hints(section, include_extras=True), {}
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        kind, *constraints = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        found[field.name] = Field(
            kind=kind,
            constraints=tuple(constraints),
            default=field.default_factory() if callable(field.default_factory) else field.default,
        )
    return found


def check_each(section: Section) -> None:
    """Check every value of `section` by the type's words and the constraints that stand beside it.

    A path gets its `~` expanded here, so that whoever reads it later finds it whole.

    Raises:
        InputError: a value cannot be used.
    """
    kind: type = type(section)
    for key, field in fields_of(kind).items():
        name, value = f"{_section_name(section)}.{key}", getattr(section, key)
        if value is None or value in field.choices:
            continue
        if field.only_choices:
            raise wrong_value(name, value, field)
        for constraint in field.constraints:
            if isinstance(value, bool) or not isinstance(value, constraint.takes):
                raise wrong_value(name, value, field)
            if not constraint.holds(value):
                raise InputError(name, value, constraint.remedy)
            if isinstance(constraint, IsPath):
                object.__setattr__(section, key, expand_home(getattr(section, key), name))


def wrong_value(name: str, value: object, field: Field) -> InputError:
    """The error about a value that is not of the field's type, or none of the words that the type names."""
    meant = did_you_mean(value, field.choices) if isinstance(value, str) else ""
    if field.only_choices:
        return InputError(name, value, f"no such choice; {meant}give one of {', '.join(field.choices)}.")
    return InputError(name, value, f"wrong type; {meant}give {field.type_name}.")


def _section_name(section: Section) -> str:
    return type(section).__name__.lower()


def _name(kind: Any) -> str:
    """`int`, `dict`, `list of str`."""
    if typing.get_origin(kind) is list:
        return f"list of {_name(typing.get_args(kind)[0])}"
    return (typing.get_origin(kind) or kind).__name__


def meanings(section: type) -> dict[str, str]:
    """The `#:` comments of a section, each in one line, by the field that they stand above; needs the source."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in map(str.strip, inspect.getsource(section).splitlines()):
        if line.startswith("#:"):
            lines.append(line.removeprefix("#:").strip())
            continue
        if lines:
            found[line.partition(":")[0]] = " ".join(lines)
        lines = []
    return found
