"""End a process that is alive but stuck.

JAX sends its heartbeats from a separate thread, so they continue while the main thread waits in a collective for a rank
that will never arrive. Only completed steps prove progress: the loop calls `beat` after each one. Without a beat in
time the process writes its stacks and exits with code 124, and its launcher ends the other processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

#: The exit code of `timeout(1)` too.
EXIT_STUCK = 124
#: Longest time, in seconds, for writing the stacks.
_DUMPING = 5.0


class Watchdog:
    """Ends this process if `beat` is not called for `timeout_seconds`.

    It uses a daemon thread, not SIGALRM: Python runs a signal handler only between two bytecodes of the main thread,
    which is stuck in C code. The daemon thread too needs C code to release the GIL, which JAX does wherever it waits.

    Args:
        timeout_seconds: longest time between two beats.
        dump_path: the file for the stacks of all threads, readable by its owner alone (frames name private files). Its
            directory must exist.
        label: the process's name in the message, such as `rank 3/80`.
    """

    def __init__(self, timeout_seconds: float, dump_path: str | Path, label: str = "this process") -> None:
        self._dump_path = Path(dump_path)
        self._label = label
        self._last = "before its first step"
        self._changed = threading.Condition()
        self._allowed = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """Restart the timeout, because `step` is complete."""
        with self._changed:
            self._last = f"after step {step}"
            self._deadline = time.monotonic() + self._allowed

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Allow `seconds` between beats within the block, for the first compilation, a restore or a checkpoint.

        A value below the current timeout has no effect. The timeout restarts at the beginning and the end of the block.
        """
        with self._changed:
            previous = self._allowed
            self._allowed = max(seconds, previous)
            self._deadline = time.monotonic() + self._allowed
        try:
            yield
        finally:
            with self._changed:
                self._allowed = previous
                self._deadline = time.monotonic() + previous
                self._changed.notify()

    def stop(self) -> None:
        """Stop watching."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
        self._end()

    def _end(self) -> NoReturn:
        where = [f"stacks could not be written within {_DUMPING:g} s"]

        def dump() -> None:
            try:
                descriptor = os.open(self._dump_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                faulthandler.dump_traceback(descriptor, all_threads=True)
                where.append(f"stacks of all threads: {self._dump_path}")
            except OSError as error:
                where.append(f"stacks could not be written: {error}")

        # In a separate thread: the process may be stuck in the very file system that the stacks are written to.
        dumping = threading.Thread(target=dump, daemon=True)
        dumping.start()
        dumping.join(_DUMPING)
        message = f"watchdog: {self._label} made no progress for {self._allowed:g} s {self._last}; {where[-1]}\n"
        # Neither print nor flush: the stuck thread may hold the lock of sys.stderr's or sys.stdout's buffer.
        os.write(2, message.encode())
        os._exit(EXIT_STUCK)
