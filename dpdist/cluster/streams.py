"""Standard streams that the caller has closed, as `2>&-` does."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Open the null device in place of every standard stream that is closed.

    The next file to be opened would otherwise get its number, and what JAX's libraries log to descriptor 2 would go
    into that file: the ledger, say. And Python, which has no `sys.stderr` then, would fail to print, or print errors
    to stdout.
    """
    streams = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
    missing = [(number, *stream) for number, stream in enumerate(streams) if getattr(sys, stream[0]) is None]
    for number, _, _ in missing:
        try:
            os.fstat(number)  # something else may have been opened under that number already
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)  # for the programs we start too
            if descriptor != number:
                os.close(descriptor)
            os.set_inheritable(number, True)  # which `dup2` of a descriptor to itself leaves as it was
    for _, name, mode in missing:
        setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115, as long-lived as the process
