"""The end of a command without Python's own: half a second of processor time goes into taking JAX's modules apart.

Import this before any library: what they have registered with `atexit`, and waiting for threads, then comes first.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import logging
import os
import sys
from contextlib import suppress

_codes: list[int] = []


def end_at_once(code: int) -> None:
    """Let this process end with `code` as soon as its threads have ended and what is registered with `atexit` has run.

    Call it last. What is not written out yet, in files that are still open, will be.
    """
    _codes.append(code)


def _end() -> None:
    if not _codes:
        return
    logging.shutdown()
    files = [
        each for each in gc.get_objects() if type(each) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    ]
    for file in [*files, sys.stdout, sys.stderr]:
        with suppress(OSError, ValueError, AttributeError):  # closed, or its reader has left
            file.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries of C have printed
    os._exit(_codes[-1])


atexit.register(_end)
