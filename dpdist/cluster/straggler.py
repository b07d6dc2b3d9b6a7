"""Find stragglers: ranks that are slower than the others, for which every step must wait.

In a sampled step each rank measures its *own seconds*: from the previous step's state until its own clipped sums are
ready, divided by its share of the work. No collective lies in between, so ranks differ only by their machine: a slow
disk, a hot or shared GPU, a busy host. The times travel through the coordination service's key-value
store, without a device collective, and process 0 evaluates them one sample later, without waiting.

The duration of a step depends on the private sample. Reports therefore belong in `private/stragglers.jsonl` only.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpdist.cluster import agreement
from dpdist.cluster.world import World

logger = logging.getLogger(__name__)

#: A rank is slow in a sample if it takes this many times the median. The others are then idle for a third of the time;
#: ordinary differences between equal machines are far smaller.
SLOW = 1.5
#: A slow rank must also exceed the median by this many seconds: short steps vary that much by OS scheduling alone.
JITTER = 0.01
#: A straggler is slow in at least `OFTEN` of its last `WINDOW` samples. A single slow sample may be a save, a cold file
#: or another job's burst; a rank that is slow in every other sample is still found within five.
OFTEN, WINDOW = 3, 5

#: Distinguishes the keys of several runs in one Python process; it advances alike on all ranks.
_serial = itertools.count()


class Detector:
    """Decides from the times of successive samples which ranks are stragglers.

    Args:
        hosts: the node of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in hosts]

    def add(self, step: int, seconds: Mapping[int, tuple[float, float]]) -> list[dict[str, Any]]:
        """Add the sample of `step` and return a report for each straggler that is slow in it.

        Args:
            seconds: rank -> (own seconds, seconds of the whole step). Ranks may be missing; if half of them or more
                are, the sample is ignored.
        """
        if len(seconds) * 2 <= len(self._hosts) or len(seconds) < 2:
            return []
        # The lower median: of two ranks, the faster one. The mean of the two would be raised by the slow one itself.
        median = statistics.median_low(own for own, _ in seconds.values())
        reports = []
        for rank, (own, whole) in sorted(seconds.items()):
            slow = own > SLOW * median and own > median + JITTER
            self._slow[rank].append(slow)
            if slow and sum(self._slow[rank]) >= OFTEN:
                reports.append(
                    {
                        "step": step,
                        "straggler": rank,
                        "host": self._hosts[rank],
                        "own_seconds": own,
                        "median_seconds": median,
                        "share_of_step": own / whole,
                    }
                )
        return reports


def share_waited(seconds: Mapping[int, tuple[float, float]]) -> float:
    """The share of a step that the median rank waits for the slowest.

    Args:
        seconds: rank -> (own seconds, seconds of the whole step), of two ranks or more.
    """
    own = [mine for mine, _ in seconds.values()]
    whole = max(step for _, step in seconds.values())
    return min(1.0, (max(own) - statistics.median_low(own)) / whole) if whole > 0 else 0.0


class Stragglers:
    """Times one in `every` steps of the loop and finds the stragglers on process 0. Does nothing with one process.

    All ranks make theirs in the same order. Nothing here waits for another process, and a missing rank is no error: its
    times are skipped. An error of the computation itself is raised by the method that waits for it.

    Args:
        every: steps between two samples. A sampled step cannot overlap with its neighbours, so sample rarely.
    """

    def __init__(self, world: World, every: int = 20) -> None:
        self._world, self._every = world, every
        self._key = f"dpdist/straggler/{next(_serial)}"
        self._detector = Detector(world.nodes)
        self._started_at = self._own = math.nan
        #: The newest sampled step; the others may still be sending their times of it.
        self._pending: int | None = None
        self._shares: list[float] = []
        self._reports: list[dict[str, Any]] = []

    def due(self, step: int) -> bool:
        """Return whether `step` is sampled: never a multiple of `every`, where the loop often saves or evaluates."""
        return self._world.num_processes > 1 and step % self._every == self._every // 2

    def began(self, step: int, state: Any) -> None:
        """Start timing a sampled step; call before its first batch is requested, with the previous step's state."""
        if self.due(step):
            jax.block_until_ready(state)
            self._started_at = time.perf_counter()

    def ready(self, step: int, sums: Any, share: float) -> None:
        """Take this rank's own seconds; call after the last microbatch, before the first collective, with its sums.

        Args:
            share: this rank's number of microbatches over that of the rank that has most; at 0 it has nothing to say.
        """
        if self.due(step):
            jax.block_until_ready(sums)
            self._own = (time.perf_counter() - self._started_at) / share if share else math.nan

    def ended(self, step: int, state: Any) -> None:
        """Send this rank's times and, on process 0, evaluate the previous sample; call after the update."""
        if not self.due(step):
            return
        jax.block_until_ready(state)
        whole = time.perf_counter() - self._started_at
        try:
            if self._world.is_main and self._pending is not None:
                self._evaluate(self._pending)
            if math.isfinite(self._own):
                self._send(step, self._own, whole)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            logger.warning("the times of step %d were not compared: %s", step, error)
        self._pending = step

    def reports(self) -> list[dict[str, Any]]:
        """Return the reports since the last call; empty on all processes but 0.

        A report has `step`, `straggler` (its rank), `host`, `own_seconds`, `median_seconds` (over the ranks) and
        `share_of_step` (own seconds divided by those of the whole step). Reports are private: see the module docstring.
        """
        reports, self._reports = self._reports, []
        return reports

    @property
    def waiting(self) -> float:
        """Mean share of a step, over the samples so far, that the median rank waits for the slowest; 0 on all but 0.

        Private, as the reports are: it is made of the times of single steps.
        """
        return statistics.fmean(self._shares) if self._shares else 0.0

    def _send(self, step: int, own: float, whole: float) -> None:
        # Overwrite: the same process may take a step again, and the store would reject a second value.
        agreement.client().key_value_set(
            f"{self._key}/{step}/{self._world.process_id}", json.dumps([own, whole]), allow_overwrite=True
        )

    def _evaluate(self, step: int) -> None:
        """Evaluate the previous sample, for which every rank has had a whole interval to report, and delete it."""
        folder = f"{self._key}/{step}/"
        seconds = {}
        for key, text in agreement.client().key_value_dir_get(folder):
            own, whole = json.loads(text)
            seconds[int(key.rpartition("/")[2])] = (own, whole)
        agreement.client().key_value_delete(folder)
        self._reports += self._detector.add(step, seconds)
        if len(seconds) > 1:
            self._shares.append(share_waited(seconds))
