"""The log of a process, under `private/`: exception texts may quote data, so they go nowhere else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class PrivateLog(logging.StreamHandler):
    """Appends log records to a file that its owner alone can read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        super().__init__(os.fdopen(descriptor, "a"))
        self.setFormatter(_FORMAT)


def log_to(path: Path) -> None:
    """Send all log records of this process to `path` too, in place of an earlier run's file."""
    root = logging.getLogger()
    for old in current():
        root.removeHandler(old)
        old.stream.close()
    root.addHandler(PrivateLog(path))


def record_exception(text: str) -> Path | None:
    """Write a traceback to the private log alone; returns its path, or None where no run has begun."""
    for handler in current():
        handler.emit(logging.LogRecord("dpdist", logging.ERROR, "", 0, text, None, None))
        return handler.path
    return None


def current() -> list[PrivateLog]:
    """The private log in use, if any."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, PrivateLog)]
