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
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115, as long-lived as the process
