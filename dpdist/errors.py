"""The exception for wrong input: it names the field, the value and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used. Raised before any training step.

    Args:
        field: dotted name of the config field, file or flag at fault, e.g. `privacy.delta`.
        value: what was given, in the form in which the user wrote it.
        remedy: what to do instead, as a full sentence.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.remedy)  # or its one text would be taken for the field
