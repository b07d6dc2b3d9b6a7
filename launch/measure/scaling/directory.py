"""The directory of a sweep: what is measured there, under which config and code, and which points are done."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.run.directory import write_atomically

#: The modules of `launch` that a point's numbers depend on, beside all of `dpdist`.
_MEASURING = ("scaling/arms.py", "scaling/point.py", "collective.py")


@dataclass(frozen=True, kw_only=True, order=True)
class Point:
    """One measurement of the sweep, and one job."""

    arm: str
    nodes: int
    #: Which of the equal measurements it is, from 1.
    repeat: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.arm}-n{self.nodes}-r{self.repeat}"

    def __str__(self) -> str:
        return f"{self.arm} n={self.nodes} r={self.repeat}"

    @staticmethod
    def of_name(name: str) -> Point:
        """The inverse of `name`."""
        match = re.fullmatch(r"(.+)-n(\d+)-r(\d+)", name)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a point")
        return Point(arm=match[1], nodes=int(match[2]), repeat=int(match[3]))


def grid(nodes: Sequence[int], arms: Sequence[str], repeats: int) -> list[Point]:
    """All points in the order in which they are measured.

    The arms of one (nodes, repeat) come next to each other and another one is first in each repeat, so that a
    machine that slows down or warms up does not favour one of them.
    """
    return [
        Point(arm=arms[(place + repeat - 1) % len(arms)], nodes=count, repeat=repeat)
        for repeat in range(1, repeats + 1)
        for count in nodes
        for place in range(len(arms))
    ]


@dataclass(frozen=True)
class SweepDirectory:
    """Names and content of a sweep's files, below `root`, an absolute path."""

    root: Path

    @property
    def description(self) -> Path:
        """What is measured: config, code and request."""
        return self.root / "sweep.json"

    @property
    def jobs(self) -> Path:
        """One record a job, and its log. For the owner alone: tracebacks may quote data."""
        return self.root / "jobs"

    def result(self, point: Point) -> Path:
        """Where the job of `point` writes; it exists once the point is done."""
        return self.root / "points" / f"{point.name}.json"

    def begin(self, description: dict[str, Any], points: Sequence[Point]) -> None:
        """Make the directory, or go on in it, perhaps with more points.

        Raises:
            InputError: what is measured there is something else.
        """
        (self.root / "points").mkdir(parents=True, exist_ok=True)
        self.jobs.mkdir(mode=0o700, exist_ok=True)
        self.jobs.chmod(0o700)
        names = [point.name for point in points]
        begun = any(self.jobs.glob("*.json")) or any((self.root / "points").iterdir())
        if begun and self.description.exists():  # else no job was ever started, so nothing needs to fit
            earlier = self.read()
            # As JSON gives it back: lists for tuples, and strings for the keys of options.
            self._require_same(json.loads(json.dumps(description["measured"])), earlier["measured"])
            names = earlier["points"] + [name for name in names if name not in earlier["points"]]
            description = earlier
        else:
            description = description | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self.description, json.dumps(description | {"points": names}, indent=2) + "\n")

    def read(self) -> dict[str, Any]:
        """`sweep.json`.

        Raises:
            InputError: there is none.
        """
        try:
            return json.loads(self.description.read_text())
        except FileNotFoundError:
            remedy = "there is no sweep.json in it; name the directory that a sweep was written to."
            raise InputError("--collect", str(self.root), remedy) from None

    def points(self) -> list[Point]:
        """All points ever asked for, in order."""
        return [Point.of_name(name) for name in self.read()["points"]]

    def measured(self, point: Point) -> dict[str, Any] | None:
        """The point's numbers, or None where it is not done."""
        try:
            return json.loads(self.result(point).read_text())
        except FileNotFoundError:
            return None

    def record(self, point: Point) -> dict[str, Any]:
        """What was last known of the point's job: `id`, `folder`, `failed`; empty before the first."""
        path = self.jobs / f"{point.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_record(self, point: Point, record: dict[str, Any]) -> None:
        """Replace what is known of the point's job."""
        write_atomically(self.jobs / f"{point.name}.json", json.dumps(record, indent=2) + "\n", mode=0o600)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one sweep at a time submits jobs from this directory.

        Raises:
            InputError: another one is at work.
        """
        with (self.jobs / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "another dpdist scaling is at work in it; wait for that, or look with --collect."
                raise InputError("--to", str(self.root), remedy) from None
            yield

    def _require_same(self, now: dict[str, Any], earlier: dict[str, Any]) -> None:
        for field in sorted(now.keys() | earlier.keys()):
            if now.get(field) != earlier.get(field):
                raise InputError(
                    field,
                    now.get(field),
                    f"the sweep in {self.root} has {earlier.get(field)!r}, and its points would not be comparable; "
                    "go on with that, or name a new directory with --to.",
                )


def measuring_code() -> str:
    """SHA-256 over the source files that the numbers of a point depend on."""
    from dpdist.run.fingerprints import code_digest

    digest = hashlib.sha256(code_digest().encode())
    for name in _MEASURING:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()
