"""The log of a process, under `private/`: exception texts may quote data, so they go nowhere else.

Even this log must not hold the secret: people read logs for good reasons, and the secret would let them subtract the
noise. dpdist never writes it; a user's own code, or a library that dumps its variables, might.
"""

from __future__ import annotations

import base64
import logging
import os
from pathlib import Path

from dpdist.mechanism.keys import Secret

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class PrivateLog(logging.StreamHandler):
    """Appends log records to a file that its owner alone can read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        super().__init__(os.fdopen(descriptor, "a"))
        self.setFormatter(_FORMAT)


class WithoutTraceback(logging.Formatter):
    """Formats as another formatter does, but of an exception shows the type alone: the rest may quote data."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        kind = record.exc_info[0] if record.exc_info else None
        bare = logging.makeLogRecord(vars(record) | {"exc_info": None, "exc_text": None, "stack_info": None})
        return self.inner.format(bare) + (f" ({kind.__name__}; private/logs has the rest)" if kind else "")


def log_to(path: Path) -> None:
    """Send all log records of this process to `path` too, in place of an earlier run's file.

    Tracebacks go there alone.
    """
    root = logging.getLogger()
    for old in current():
        root.removeHandler(old)
        old.stream.close()
    for handler in root.handlers:
        inner = handler.formatter.inner if isinstance(handler.formatter, WithoutSecret) else handler.formatter
        if not isinstance(inner, WithoutTraceback):
            handler.setFormatter(WithoutTraceback(inner or logging.Formatter()))
    root.addHandler(PrivateLog(path))
    logging.captureWarnings(True)  # what Pillow warns of an image, say, is about one record


def record_exception(text: str) -> Path | None:
    """Write a traceback to the private log alone; returns its path, or None where no log is open yet."""
    for handler in current():
        handler.emit(logging.LogRecord("dpdist", logging.ERROR, "", 0, text, None, None))
        return handler.path
    return None


class WithoutSecret(logging.Formatter):
    """Formats as another formatter does, and replaces every usual spelling of the secret, in tracebacks too."""

    def __init__(self, inner: logging.Formatter, secret: Secret) -> None:
        super().__init__()
        key = secret.reveal()
        self.inner = inner
        self._spellings = sorted(
            {
                key.decode("latin-1"),
                repr(key)[2:-1],
                key.hex(),
                key.hex().upper(),
                base64.b64encode(key).decode().rstrip("="),
                base64.urlsafe_b64encode(key).decode().rstrip("="),
                ", ".join(map(str, key)),
            },
            key=len,
            reverse=True,
        )

    def format(self, record: logging.LogRecord) -> str:
        text = self.inner.format(record)
        for spelling in self._spellings:
            text = text.replace(spelling, "(secret)")
        return text


def keep_out_of_logs(secret: Secret) -> None:
    """Keep `secret` out of everything that is logged after this call, to the private log and elsewhere."""
    for handler in logging.getLogger().handlers:
        inner = handler.formatter or logging.Formatter()
        inner = inner.inner if isinstance(inner, WithoutSecret) else inner
        handler.setFormatter(WithoutSecret(inner, secret))


def current() -> list[PrivateLog]:
    """The private log in use, if any."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, PrivateLog)]
