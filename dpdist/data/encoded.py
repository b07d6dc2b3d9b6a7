"""A source whose examples are decoded as they are read, on the threads that read them: images, text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dpdist.data.sources import BadRecordError, for_devices
from dpdist.errors import InputError


@runtime_checkable
class Encoded(Protocol):
    """Records as they are stored, and how one becomes columns; used by several threads at once."""

    #: How they are decoded, and whatever else says cheaply what they are; hashed, never shown.
    identity: str
    #: What one is, for errors: `an image`.
    kind: str

    def __len__(self) -> int: ...

    def stored(self, index: int) -> bytes:
        """The record as it is stored."""
        ...

    def decode(self, index: int) -> dict[str, np.ndarray]:
        """The columns of a record.

        Raises:
            InputError: with the remedy, where all records need one.
            Exception: anything else, where this one is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """Where the record is stored, for private logs."""
        ...


class EncodedSource:
    """Examples of columns that are held in memory, and of others that are decoded when an example is read.

    Args:
        arrays: array[N, ...] by column name, such as the labels.
        encoded: the records of N examples each.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], encoded: Sequence[Encoded]) -> None:
        self.arrays = {name: for_devices(repr(name), values) for name, values in arrays.items()}
        self.encoded = list(encoded)

    def __len__(self) -> int:
        return len(self.encoded[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {name: values[index] for name, values in self.arrays.items()}
        for records in self.encoded:
            try:
                example |= records.decode(index)
            except InputError as error:
                raise error from BadRecordError(f"example {index}, {records.name(index)}")
            except Exception as error:  # whatever a decoder says of a damaged record; it may quote it
                raise InputError(
                    "data.source",
                    f"{records.kind} that cannot be decoded",
                    "mend it or take it out; `dpdist data describe CONFIG --all` names every such one.",
                ) from BadRecordError(f"example {index}, {records.name(index)}: {type(error).__name__}: {error}")
        return example

    def stored(self, index: int) -> bytes:
        """The example's records as they are stored, for fingerprints."""
        return b"\0".join(records.stored(index) for records in self.encoded)
