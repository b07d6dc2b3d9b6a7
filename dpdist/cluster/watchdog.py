"""The end of a process that is alive but stuck.

JAX's heartbeats come from a thread of their own and go on while the main thread waits in a collective for a
rank that will never come. Only progress in steps tells: `beat` after each, or the process ends itself with
exit code 124, its launcher ends the others, and the stacks say where it was.
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

#: What `timeout(1)` returns too.
EXIT_STUCK = 124
#: Seconds that writing the stacks may take.
_DUMPING = 5.0


class Watchdog:
    """Ends this process when no beat has come for `timeout_seconds`.

    A daemon thread, not SIGALRM: a signal handler of Python runs only between two bytecodes of the main
    thread, and that one is stuck in C. For the same reason it works only while C code releases the GIL, as
    JAX does wherever it waits.

    Args:
        timeout_seconds: longest time between two beats.
        dump_path: where the stacks of all threads are written, readable by the owner alone (frames name
            private files). Its directory must exist.
        label: how the process is called in the message, such as `rank 3/80`.
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
        """`step` was completed: the time starts anew."""
        with self._changed:
            self._last = f"after step {step}"
            self._deadline = time.monotonic() + self._allowed

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Let `seconds` pass between beats within the block: first compilation, restore, checkpoint.

        Never less than outside it. The time starts anew where the block begins and where it ends.
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
        """Watch no more: the work is done."""
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

        # A thread of its own: what everything waits for may be the file system that the stacks would go to.
        dumping = threading.Thread(target=dump, daemon=True)
        dumping.start()
        dumping.join(_DUMPING)
        message = f"watchdog: {self._label} made no progress for {self._allowed:g} s {self._last}; {where[-1]}\n"
        # Not print, nor a flush: the stuck thread may hold the lock of sys.stderr's or sys.stdout's buffer.
        os.write(2, message.encode())
        os._exit(EXIT_STUCK)
