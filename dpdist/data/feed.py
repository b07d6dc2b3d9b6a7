"""The prefetching feed: samples, assigns and reads the next examples on a thread while the devices compute."""

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
from dpdist.data.sources import BadRecordError, Source
from dpdist.errors import InputError
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import Microbatch


class Feed:
    """The microbatches of steps [start, stop), in order and round by round, on this process's devices.

    A thread works ahead across steps, so that sampling, assigning and reading of step t+1 overlap with step t.

    Args:
        source: training examples; only the rows of this process's devices are read.
        assigner: returns the `Assignment` of a step number; pure, called on the feed's thread.
        mesh: the job's devices.
        data: `prefetch` (how many items to prepare in advance) and `workers` (threads that read examples).
        start: first step.
        stop: step after the last.
    """

    def __init__(
        self, source: Source, assigner: Callable[[int], Assignment], mesh: Mesh, *, data: Data, start: int, stop: int
    ) -> None:
        self._assigner, self._placement = assigner, Placement(source, mesh, workers=data.workers)
        #: For every step its assignment, then its rounds of microbatches; or the exception that ended the thread.
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=data.prefetch)
        self._closed = threading.Event()
        #: Seconds that the thread spent on sampling and assigning.
        self.assign_seconds = 0.0
        #: Seconds that the consumer waited for data.
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(start, stop), name="dpdist-feed", daemon=True)
        self._thread.start()

    def next_assignment(self) -> Assignment:
        """Return the next step's assignment; call it once a step, then consume all of its `rounds`."""
        return self._get()

    def rounds(self, assignment: Assignment) -> Iterator[dict[int, Microbatch]]:
        """Yield the microbatches of the step whose assignment was returned last: one a device, by its position.

        Devices that have none left are missing in the last rounds.
        """
        for _ in range(assignment.rounds):
            yield self._get()

    def _get(self) -> Any:
        began = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if (
            isinstance(item, InputError)
            and isinstance(item.__cause__, BadRecordError)
            and item.field.startswith("data.")
        ):
            raise item  # its words are ours; of the others, some name a column, which may be this record's alone
        if isinstance(item, BaseException):
            # The error may quote an example, so this message does not; the cause goes to the private log.
            raise RuntimeError("the training examples could not be read") from item
        return item

    def close(self) -> None:
        """Stop the thread and drop what it has prepared."""
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
                assignment = self._assigner(step)
                self.assign_seconds += time.perf_counter() - began
                self._put(assignment)
                for number in range(assignment.rounds):
                    if self._closed.is_set():
                        return
                    self._put(self.assemble(assignment, number))
        except BaseException as error:  # raised again by `_get` in the consumer
            self._put(error)

    def assemble(self, assignment: Assignment, number: int) -> dict[int, Microbatch]:
        """Read this process's rows of round `number`, pad them with zeros and place them on its devices."""
        placement = self._placement
        own = {device: rows for device in placement.local if len(rows := assignment.rows(device, number))}
        if not own:
            return {}
        data, real = placement.read(np.concatenate(list(own.values())))
        parts, start = {}, 0
        for device, rows in own.items():
            stop = start + len(rows)
            mask, index = real[start:stop].astype(np.float32), np.where(rows >= 0, rows, 0).astype(np.int32)
            columns = {name: values[start:stop] for name, values in data.items()}
            parts[device], start = placement.put(Microbatch(columns, mask, index), device), stop
        return parts
