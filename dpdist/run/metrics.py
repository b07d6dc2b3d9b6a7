"""Two streams of measurements: public metrics, and diagnostics that stay under `private/`.

Public are numbers that the guarantee covers or that do not depend on the data: steps, epsilon, B * steps / time, and
test metrics once the checkpoint they were measured on is committed. Everything else is private.
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
        """fsync the file."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Publisher:
    """Public metrics, in which test metrics wait for their checkpoint.

    A resumed run must not be able to take back a published result: if an accuracy were published and its step then
    lost in a crash, the step would be replayed after somebody had seen its outcome.
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
        """fsync the stream; held records are not in it."""
        self._stream.synchronise()

    def close(self) -> None:
        """Close the stream; records still held are dropped."""
        self._stream.close()

    def release(self, step: int) -> list[dict[str, Any]]:
        """Write the held records up to `step`, and return them; call it once that step's checkpoint is committed."""
        released = [record for record in self._pending if record["step"] <= step]
        self._pending = [record for record in self._pending if record["step"] > step]
        for record in released:
            self._stream.write(record)
        return released


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a stream: the last of each step, as a resumed run records replayed steps again.

    Where a new incarnation went back to an earlier step, the records after that step are left out.
    """
    if not path.exists():
        return []
    records: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if "incarnation" in record:
            records = {key: kept for key, kept in records.items() if key[0] <= record["step"]}
        else:
            records[record["step"], is_evaluation(record)] = record
    return [records[key] for key in sorted(records)]


#: What a record of an evaluation holds beside the metrics.
_BESIDE_METRICS = ("step", "epsilon")


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record holds test metrics; the others hold the throughput, or begin an incarnation."""
    return "examples_per_second" not in record and "incarnation" not in record


def metrics_of(record: dict[str, Any]) -> dict[str, float | None]:
    """The test metrics in the record of an evaluation, by name."""
    return {name: value for name, value in record.items() if name not in _BESIDE_METRICS}
