"""Processes that read examples for this one, where threads would wait for each other: for a source in pure Python.

Each opens the data by itself, so all that is sent to it are indices, and all that comes back are columns. It is a
program of its own, not a fork, which JAX's threads forbid, nor `multiprocessing`'s, which runs the user's script again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dpdist.config import Data
from dpdist.data.datasets import GIVEN, Dataset
from dpdist.data.serve import LEAVE
from dpdist.data.sources import BadRecordError, Rows, Subset, TakeSource, require_one_schema
from dpdist.errors import InputError

FIELD = "data.worker_processes"
#: Blocks that each process reads of a request, so that one with slow examples is not waited for alone.
_BLOCKS = 4
#: Seconds to end after the pipe is closed: an example may be under way.
_PATIENCE = 5.0
#: Seconds between two looks whether a process that does not answer is still there.
_LOOK = 1.0
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dpdist.data.serve import serve; serve(int(sys.argv[2]))"
)


class ReadingError(RuntimeError):
    """What was raised in a reading process, or that it has ended; as private as the examples."""


@contextlib.contextmanager
def read_in_processes(
    dataset: Dataset, data: Data, fingerprints: Mapping[str, bytes], log: Path | None
) -> Iterator[Dataset]:
    """Within the block, the dataset's examples are read by `data.worker_processes` processes; by none of them if 0.

    Args:
        dataset: what `open_dataset` gave for `data`.
        fingerprints: of its parts; the processes must have the same data.
        log: what the processes print, which may quote data, goes to files of this name and `.0.log`, `.1.log`, ...;
            None leaves it on this process's streams.

    Raises:
        InputError: the data was passed as an object or is held as arrays; it cannot be opened in another process; or is
            other data there.
    """
    if data.worker_processes == 0:
        yield dataset
        return
    _require_use(dataset, data)
    pool = _Readers(data, log)
    try:
        pool.open(fingerprints)
        test = None if dataset.test is None else _Remote(pool, "test", len(dataset.test))
        yield replace(dataset, train=_Remote(pool, "train", len(dataset.train)), test=test)
    finally:
        pool.close()


def _require_use(dataset: Dataset, data: Data) -> None:
    base = dataset.train.source if isinstance(dataset.train, Subset) else dataset.train
    if data.source == GIVEN:
        remedy = (
            "other processes cannot open an object; name a function that returns it as data.source: module:function."
        )
    elif isinstance(base, TakeSource):
        remedy = "these examples are arrays, which need no processes to be read; leave it out."
    else:
        return
    raise InputError(FIELD, data.worker_processes, remedy)


class _Remote:
    """One part of the data, as a source that the processes read."""

    def __init__(self, readers: _Readers, part: str, length: int) -> None:
        self._readers, self._part, self._length = readers, part, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {name: rows[0] for name, rows in self.take_with(np.array([index], np.int64), None).items()}

    def take_with(self, indices: Int64[np.ndarray, " n"], pool: Executor | None) -> Rows:
        """The examples at `indices`, in their order; `pool` is not used."""
        return self._readers.take(self._part, indices)


class _Readers:
    """The processes, and who is asked for what."""

    def __init__(self, data: Data, log: Path | None) -> None:
        self._data, self._log, self._lock = data, log, threading.Lock()
        self._broken = False
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        try:
            for number in range(data.worker_processes):
                ours, process = _start(None if log is None else log.with_name(f"{log.name}.{number}.log"))
                self._processes[ours] = process
        except BaseException:
            self.close()
            raise

    def open(self, fingerprints: Mapping[str, bytes]) -> None:
        """Have all open the data at once, and compare what they see."""
        if any(found != fingerprints for found in self._exchange([self._data] * len(self._processes))):
            raise InputError(
                "data.source",
                self._data.source,
                f"gives other examples in another process, so {FIELD} cannot be used; return the same example for "
                "an index in every process (the order of a set is another one in each).",
            )

    def take(self, part: str, indices: Int64[np.ndarray, " n"]) -> Rows:
        """The examples at `indices`, in their order, read by whichever processes are free."""
        blocks = np.array_split(indices, min(max(1, len(indices)), _BLOCKS * len(self._processes)))
        found: list[Rows] = self._exchange([(part, block) for block in blocks])
        if len(indices):
            firsts = [{name: values[0] for name, values in rows.items()} for rows in found]
            require_one_schema(firsts, [int(block[0]) for block in blocks])  # within a block, it was checked there
        return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}

    def _exchange(self, requests: Sequence[Any]) -> list[Any]:
        """What is answered to each request; a process has one at a time, and each its first before one has a second.

        Raises:
            InputError: of the first answer that is an error; what is asked already is waited for.
            ReadingError: the same; or a process has ended, and nothing can be read any more.
        """
        answers, waiting, free = [None] * len(requests), deque(range(len(requests))), deque(self._processes)
        asked: dict[Connection, int] = {}
        failure: Exception | None = None
        with self._lock:
            if self._broken:
                raise ReadingError("a process that reads examples has ended before")
            # Should this be interrupted, answers to it may still come, which the next call would take for its own.
            self._broken = True
            while True:
                while free and waiting and failure is None:
                    asked[pipe := free.popleft()] = number = waiting.popleft()
                    self._send(pipe, requests[number])
                if not asked:
                    break
                for pipe in self._ready(asked):
                    number = asked.pop(pipe)
                    answers[number], error = self._receive(pipe)
                    failure = failure or error
                    free.append(pipe)
            self._broken = False
        if failure is not None:
            raise failure from failure.__cause__
        return answers

    def _ready(self, asked: Collection[Connection]) -> list[Connection]:
        """Those of `asked` that have answered; one has at least.

        Raises:
            ReadingError: one has ended.
        """
        while not (ready := [each for each in wait(list(asked), _LOOK) if isinstance(each, Connection)]):
            # What the user's source has started may hold the pipe of a process that has ended open.
            for pipe in asked:
                if self._processes[pipe].poll() is not None and not pipe.poll():
                    raise self._ended(pipe)
        return ready

    def _send(self, pipe: Connection, request: Any) -> None:
        try:
            pipe.send(request)
        except OSError:
            raise self._ended(pipe) from None

    def _receive(self, pipe: Connection) -> tuple[Any, Exception | None]:
        try:
            rows, error, what = pipe.recv()
        except (EOFError, OSError):
            raise self._ended(pipe) from None
        if error is not None and what:
            error.__cause__ = BadRecordError(what)
        return rows, ReadingError(what) if what and error is None else error

    def _ended(self, pipe: Connection) -> ReadingError:
        process = self._processes[pipe]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        told = "" if self._log is None else f" ({self._log}.*.log may say why)"
        return ReadingError(f"a process that reads examples has ended with exit code {process.returncode}{told}")

    def close(self) -> None:
        """End the processes; what they are reading is dropped."""
        for pipe in self._processes:
            pipe.close()
        deadline = time.monotonic() + _PATIENCE
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead file system
                    process.wait(_LOOK)


def _start(log: Path | None) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start a process that does not hear the signals of `LEAVE`, until it says so itself."""
    ours, theirs = Pipe()
    output = os.dup(2) if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a source of the user's may import JAX; the devices are taken
        )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        os.close(output)
    return ours, process
