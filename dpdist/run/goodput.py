"""Goodput: what a run's node-hours went into, over all its parts.

One clock on process 0: at every moment exactly one phase runs, and its seconds, times the nodes that the job holds, are
added up in `private/goodput.json`, which every later part reads and goes on with. It is written every `EVERY` seconds
and at each phase that ends a save, so a crash loses at most the time since then; the next part finds out how long that
was by the last heartbeat of the dead job's lease, and counts it as `lost`. Steps that have to be taken again, or that a
later incarnation has abandoned, are `lost` too: their seconds move there from `training`.

Private and public. The file is private: times tell the sample's size (docs/threat-model.md). Public are `shares`, sums
over all steps of the run in whole percents: the time of all steps together is public anyway, as B * steps / time.
Waiting for stragglers, which is taken from single steps, stays private; it is a part of `training`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: In the order in which they are shown: joining and opening, the programs, the steps, tests, saves, what was in vain.
PHASES = ("start_up", "compile", "training", "evaluation", "saving", "lost")
#: Seconds between two writes while steps are taken.
EVERY = 10.0
#: Saves that are remembered: an older checkpoint than all of them counts as the oldest of them.
_REMEMBERED = 200


class Goodput:
    """The clock of a run, on process 0.

    Args:
        path: the file; an earlier part's is read. One that cannot be read begins anew, with a warning.
        nodes: that the job holds.
        began: when this part began, by `time.monotonic`; so long it has been starting up.
        last_sign: when the part before gave its last sign of life, by the clock of the file system; None if it ended in
            good order, or there was none.
    """

    def __init__(self, path: Path, *, nodes: int, began: float, last_sign: float | None = None) -> None:
        self._path, self._nodes = path, nodes
        self._phase, self._since = "start_up", began
        #: Share of a step that ranks wait for the slowest, as far as it was sampled.
        self._waiting = 0.0
        self._trained_here = 0.0
        earlier = read(path)
        if earlier is None and path.exists():
            logger.warning("%s cannot be read: what the time went into is counted anew", path)
        self._node_seconds = dict.fromkeys(PHASES, 0.0) | (earlier["node_seconds"] if earlier else {})
        self._waited = float(earlier["waiting"]) if earlier else 0.0
        self._queued = earlier["queue_seconds"] if earlier else None
        #: Step -> node-seconds of training when it was given to be saved.
        self._saves: list[list[float]] = earlier["saves"] if earlier else []
        if earlier and not earlier["closed"] and last_sign is not None:
            unwritten = max(0.0, last_sign - path.stat().st_mtime)
            self._node_seconds["lost"] += unwritten * earlier["nodes"]
        self.write()  # a crash from now on is one of this part

    def queued(self, seconds: float) -> None:
        """Add the seconds for which this part waited in SLURM's queue, as far as SLURM told; no node was held."""
        self._queued = (self._queued or 0.0) + seconds

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: what was trained after that is lost."""
        kept = max((trained for saved, trained in self._saves if saved <= step), default=0.0)
        lost = max(0.0, self._node_seconds["training"] - kept)
        self._node_seconds["training"] -= lost
        self._node_seconds["lost"] += lost
        self._waited = min(self._waited, self._node_seconds["training"])
        self._saves = [save for save in self._saves if save[0] <= step]
        self.write()

    def enter(self, phase: str) -> None:
        """From now on, `phase` runs."""
        now = time.monotonic()
        spent = (now - self._since) * self._nodes
        self._node_seconds[self._phase] += spent
        if self._phase == "training":
            self._trained_here += spent
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`name` runs within the block, and after it what ran before."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def saving(self, step: int) -> None:
        """The state after `step` steps is being saved: what was trained up to here will not be lost."""
        self.enter(self._phase)
        self._saves = [*self._saves, [step, self._node_seconds["training"]]][-_REMEMBERED:]

    def tick(self, waiting: float) -> None:
        """A step is done; write if it is time.

        Args:
            waiting: the mean share of a step in which ranks wait for the slowest, as sampled so far in this part.
        """
        self._waiting = waiting
        if time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self, *, closed: bool = False) -> None:
        """Write the file; what fails is a warning, as no run shall end for its book-keeping.

        Args:
            closed: this part ends here, in good order.
        """
        self.enter(self._phase)
        self._written = time.monotonic()
        record = {
            "node_seconds": {name: round(seconds, 3) for name, seconds in self._node_seconds.items()},
            "waiting": round(self._waited + self._waiting * self._trained_here, 3),
            "queue_seconds": self._queued,
            "nodes": self._nodes,
            "closed": closed,
            "saves": [[step, round(trained, 3)] for step, trained in self._saves],
        }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            # Renamed, so that it is whole, but not fsynced: what a power cut takes of it counts as lost time.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(record) + "\n")
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("%s could not be written (%s)", self._path, error.strerror)

    def public(self) -> dict[str, Any]:
        """What `summary.json` says of it: `public_of` the present."""
        self.enter(self._phase)
        return public_of({"node_seconds": self._node_seconds, "queue_seconds": self._queued})


def read(path: Path) -> dict[str, Any] | None:
    """The content of the file; None where there is none, or none that is whole."""
    try:
        record = json.loads(path.read_text())
        whole = (
            record["node_seconds"].keys() == set(PHASES)
            and all(float(seconds) >= 0 for seconds in record["node_seconds"].values())
            and float(record["waiting"]) >= 0
            and float(record["queue_seconds"] or 0) >= 0
            and int(record["nodes"]) > 0
            and isinstance(record["closed"], bool)
            and all(len(save) == 2 for save in record["saves"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(record) if whole else None


def public_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The public part of a record of the file: shares of the node-hours in whole percents, and how many there were."""
    whole = sum(record["node_seconds"].values())
    shares = {name: round(record["node_seconds"][name] / whole, 2) if whole else 0.0 for name in PHASES}
    queued = record["queue_seconds"]
    return {
        "shares": shares,
        "node_hours": float(f"{whole / 3600:.2g}"),
        "queue_hours": None if queued is None else float(f"{queued / 3600:.2g}"),
    }


def sentence(public: Mapping[str, Any]) -> str:
    """`public_of` in one line, largest first: `1.2 node-hours: training 83%, compile 9%, start-up 8%`."""
    parts = sorted(public["shares"].items(), key=lambda part: -part[1])
    said = ", ".join(f"{name.replace('_', '-')} {share:.0%}" for name, share in parts if share)
    queued = f"; {public['queue_hours']:g} h in the queue" if public["queue_hours"] is not None else ""
    return f"{public['node_hours']:g} node-hours: {said}{queued}"


def process_began() -> float:
    """When this process was started, by `time.monotonic`; now where the system does not tell."""
    now = time.monotonic()
    try:
        # After the name, in parentheses, which may hold any character: state is field 3, the start field 22.
        ticks = int(Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now
