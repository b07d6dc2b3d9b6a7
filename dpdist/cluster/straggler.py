"""Which rank keeps the others waiting: a step ends for all when its slowest rank is done.

In a sampled step each rank measures its *own seconds*, from the state of the step before until its own clipped sums
are ready. No collective lies in between and all devices have equally many microbatches, so what differs between ranks
is the machine: a slow disk, a hot or shared GPU, a busy host. The numbers travel through the coordination service's
key-value store, without a device collective, and process 0 looks at them one sample later, without waiting.

How long a step takes depends on the private sample. Reports belong into `private/stragglers.jsonl` and nowhere
else.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpdist.cluster import agreement
from dpdist.cluster.world import World

logger = logging.getLogger(__name__)

#: A rank is slow in a sample at this many times the median: the others then idle a third of the time, which is worth a
#: look at its host; ordinary differences between equal machines stay far below.
SLOW = 1.5
#: Seconds above the median below which no rank is slow: what an operating system's scheduler does to short steps.
JITTER = 0.01
#: A straggler is slow in at least `OFTEN` of its last `WINDOW` samples: one is a hiccup (a save, a cold file, another
#: job's burst), and a rank that is slow every other step or more often still comes to light within five.
OFTEN, WINDOW = 3, 5

#: Two runs in one Python must not read each other's numbers; all processes count alike.
_serial = itertools.count()


class Judge:
    """Who is a straggler, sample by sample.

    Args:
        hosts: host name of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in hosts]

    def add(self, step: int, seconds: Mapping[int, tuple[float, float]]) -> list[dict[str, Any]]:
        """The stragglers that the sample of `step` confirms; a rank that is fast in it is not among them.

        Args:
            seconds: rank -> (own seconds, seconds of the whole step). Ranks may be missing; where half of them or more
                are, the sample tells nothing.
        """
        if len(seconds) * 2 <= len(self._hosts) or len(seconds) < 2:
            return []
        # Of an even number the lower middle: of two ranks the faster one, or else the slow one would be half of what
        # it is compared with.
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


class Stragglers:
    """Times every `every`-th step of the loop, and finds the stragglers on process 0. Does nothing with one process.

    Construction is collective; it raises what `agreement.all_gather` does. After it, nothing here waits for another
    process or fails for want of one: an answer that is missing is skipped. Only an error of the computation itself
    comes out where it is waited for.

    Args:
        every: steps from sample to sample. A sampled step can't overlap with its neighbours, so sample seldom.
    """

    def __init__(self, world: World, every: int = 20) -> None:
        self._world, self._every = world, every
        self._key = f"dpdist/straggler/{next(_serial)}"
        self._judge = Judge(agreement.all_gather(socket.gethostname(), world))
        self._began = self._own = math.nan
        #: On process 0: the newest sample, which others may still be sending.
        self._open: int | None = None
        self._reports: list[dict[str, Any]] = []

    def due(self, step: int) -> bool:
        """Whether `step` is sampled. Not a multiple of `every`: after one the loop tends to save and evaluate."""
        return self._world.num_processes > 1 and step % self._every == self._every // 2

    def began(self, step: int, state: Any) -> None:
        """Call before the step's first batch is asked for, with what the step before has computed."""
        if self.due(step):
            jax.block_until_ready(state)
            self._began = time.perf_counter()

    def ready(self, step: int, sums: Any) -> None:
        """Call after the last microbatch, before the first collective, with this process's clipped sums."""
        if self.due(step):
            jax.block_until_ready(sums)
            self._own = time.perf_counter() - self._began

    def ended(self, step: int, state: Any) -> None:
        """Call after the update, with what it computes."""
        if not self.due(step):
            return
        jax.block_until_ready(state)
        whole = time.perf_counter() - self._began
        try:
            if self._world.is_main and self._open is not None:
                self._close(self._open)
            self._send(step, self._own, whole)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            logger.warning("the times of step %d were not compared: %s", step, error)
        self._open = step

    def reports(self) -> list[dict[str, Any]]:
        """What was found since the last call, on process 0: step, straggler (its rank), host, own_seconds,
        median_seconds (over the ranks) and share_of_step (own seconds over those of the whole step).

        Private: see the head of this module.
        """
        reports, self._reports = self._reports, []
        return reports

    def _send(self, step: int, own: float, whole: float) -> None:
        # Overwriting, or a step that is taken anew in the same process would be refused.
        agreement.client().key_value_set(
            f"{self._key}/{step}/{self._world.process_id}", json.dumps([own, whole]), allow_overwrite=True
        )

    def _close(self, step: int) -> None:
        """Judge a sample of which all numbers have had a whole interval to arrive, and delete it."""
        folder = f"{self._key}/{step}/"
        seconds = {}
        for key, text in agreement.client().key_value_dir_get(folder):
            own, whole = json.loads(text)
            seconds[int(key.rpartition("/")[2])] = (own, whole)
        agreement.client().key_value_delete(folder)
        self._reports += self._judge.add(step, seconds)
