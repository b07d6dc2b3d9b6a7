"""What C libraries write to descriptor 2 while they decode a record: where everyone may read it, nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_within = 0
_kept = -1


@contextlib.contextmanager
def silent_descriptor() -> Iterator[None]:
    """Point descriptor 2 at the null device within the block, on all threads, if Python's own stderr is another one.

    It is in `dpdist train`, whose log others may read. Elsewhere nothing is done, or Python would lose lines too. The
    price: what XLA says in the same milliseconds is lost.
    """
    global _within, _kept
    if not _apart():
        yield
        return
    with _lock:
        if _within == 0:
            _kept = os.dup(2)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                os.dup2(_kept, 2)
                os.close(_kept)


def _apart() -> bool:
    try:
        return sys.stderr.fileno() != 2
    except (OSError, ValueError, AttributeError):  # a stream in memory, a closed one, none
        return False
