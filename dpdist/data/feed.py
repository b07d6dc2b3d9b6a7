"""The prefetching feed: samples, plans and gathers ahead on a thread while the devices work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dpdist.config import Data
from dpdist.data.placement import Placement
from dpdist.data.sources import Source
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import Microbatch


class Feed:
    """Microbatches of steps [start, stop), in order, for this process's devices.

    Args:
        source: training examples; only rows of this process's devices are read.
        plan: step number to `Assignment`; pure, called on the feed's thread.
        mesh: the job's devices.
        data: how far ahead to work (`prefetch`), and with how many threads (`workers`).

    The thread runs ahead across steps, so sampling, planning and gathering of step t+1 overlap step t.
    """

    def __init__(
        self, source: Source, plan: Callable[[int], Assignment], mesh: Mesh, *, data: Data, start: int, stop: int
    ) -> None:
        self._plan, self._placement = plan, Placement(source, mesh, workers=data.workers)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=data.prefetch)
        self._closed = threading.Event()
        #: Seconds spent sampling and planning (on the thread), and waited for data (by the consumer).
        self.assign_seconds = 0.0
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(start, stop), name="dpdist-feed", daemon=True)
        self._thread.start()

    def next_assignment(self) -> Assignment:
        """The plan of the next step; call it once, then read all its `microbatches`."""
        return self._get()

    def microbatches(self, plan: Assignment) -> Iterator[Microbatch]:
        """The microbatches of that step, on the devices."""
        for _ in plan.microbatches:
            yield self._get()

    def _get(self) -> Any:
        began = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            # Whatever it is, it may quote the example at fault: the cause is for the private log.
            raise RuntimeError("the training examples could not be read") from item
        return item

    def close(self) -> None:
        """Stop the thread; what it holds ready is dropped."""
        self._closed.set()
        while self._thread.is_alive():
            with self._queue.mutex:
                self._queue.queue.clear()
                self._queue.not_full.notify_all()
            self._thread.join(0.05)
        self._placement.close()

    def _put(self, item: Any) -> None:
        if not self._closed.is_set():
            self._queue.put(item)

    def _run(self, start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                began = time.perf_counter()
                plan = self._plan(step)
                self.assign_seconds += time.perf_counter() - began
                self._put(plan)
                for microbatch in range(len(plan.microbatches)):
                    if self._closed.is_set():
                        return
                    self._put(self.assemble(plan, microbatch))
        except BaseException as error:  # re-raised where the batch is awaited
            self._put(error)

    def assemble(self, plan: Assignment, microbatch: int) -> Microbatch:
        """One microbatch: this process's rows, gathered, zero-padded and sent to its devices."""
        place = self._placement
        rows = np.concatenate([plan.rows(device, microbatch) for device in place.local])
        data, real = place.examples(rows)
        return Microbatch(
            data, place.send(real.astype(np.float32)), place.send(np.where(real, rows, 0).astype(np.int32))
        )
