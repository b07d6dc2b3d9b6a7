"""Two streams of measurements: public metrics, and diagnostics that stay under `private/`.

Public is what the guarantee covers or what does not depend on the data: steps, epsilon, B * steps / time,
and accuracy once the checkpoint it was measured on is committed. Private is the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Stream:
    """A file of JSON objects, one a line, appended and flushed line by line."""

    def __init__(self, path: Path, *, mode: int = 0o644) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
        whole = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(descriptor, whole)  # a line torn by a crash would swallow the next
        self._file = os.fdopen(descriptor, "a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def synchronise(self) -> None:
        """Have the operating system write to the disk what was written here."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Publisher:
    """Public metrics, in which accuracy waits for its checkpoint.

    A result that is shown must be one that a resumed run cannot take back: if an accuracy were shown and
    its step then lost in a crash, the step would be replayed after a look at its outcome.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pending: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        """Write a record that does not depend on the parameters."""
        self._stream.write(record)

    def hold(self, record: dict[str, Any]) -> None:
        """Keep a record that depends on the parameters until `release`."""
        self._pending.append(record)

    def synchronise(self) -> None:
        """As `Stream.synchronise`, without what is held."""
        self._stream.synchronise()

    def close(self) -> None:
        """Close the stream; what is still held stays unsaid."""
        self._stream.close()

    def release(self, step: int) -> list[dict[str, Any]]:
        """Write what is held up to `step`; call it when that step's checkpoint is committed."""
        released = [record for record in self._pending if record["step"] <= step]
        self._pending = [record for record in self._pending if record["step"] > step]
        for record in released:
            self._stream.write(record)
        return released


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a stream. After a resume, the last record of a step counts.

    Where a new incarnation went back to an earlier step, what followed that step belongs to the past.
    """
    if not path.exists():
        return []
    records: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "incarnation" in record:
            records = {key: kept for key, kept in records.items() if key[0] <= record["step"]}
        else:
            records[record["step"], "accuracy" in record] = record
    return [records[key] for key in sorted(records)]
