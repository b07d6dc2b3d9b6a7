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
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_codes: list[int] = []
#: Files in which flushing leaves nothing unwritten.
_PLAIN = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedReader, io.FileIO)


def end_at_once(code: int) -> None:
    """Let this process end with `code` as soon as its threads have ended and what is registered with `atexit` has run.

    Call it last. What is not written out yet, in files of Python's `io` that are still open, will be.
    """
    _codes.append(code)


def _end() -> None:
    if not _codes:
        return
    logging.shutdown()
    gc.unfreeze()
    standard = {id(each) for each in (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)}
    files = [each for each in gc.get_objects() if issubclass(type(each), io.IOBase) and id(each) not in standard]
    plain = [*(each for each in files if type(each) in _PLAIN), sys.stdout, sys.stderr]
    _flush(plain)  # text may be in front of a compressed file
    for file in files:
        if type(file) not in _PLAIN:
            with suppress(Exception):  # of whatever library
                file.close()  # which writes the end of a compressed file
    _flush(plain)
    ctypes.CDLL(None).fflush(None)  # what libraries of C have printed
    os._exit(_codes[-1])


def _flush(files: Iterable[Any]) -> None:
    for file in files:
        with suppress(OSError, ValueError, AttributeError):  # closed, or its reader has left
            file.flush()


atexit.register(_end)
