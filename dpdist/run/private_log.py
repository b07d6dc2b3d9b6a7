"""The log of a process, under `private/`: exception texts may quote data, so they go nowhere else.

Nor does what libraries log or warn of, since that they warn at all may be about one record: Pillow of a large image, in
just the steps that sample it. Of what is logged, our own lines alone go elsewhere (`OWN`).

Even this log must not hold the secret: people read logs for good reasons, and the secret would let them subtract the
noise. dpdist never writes it; a user's own code, or a library that dumps its variables, might.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dpdist.mechanism.keys import Secret

#: The first part of a logger's name whose lines everyone may read: dpdist's packages, a script that calls them, and
#: what `dpdist submit` starts them by, which sees no data.
OWN = ("dpdist", "dpdist_launch", "__main__", "submitit")

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class PrivateLog(logging.StreamHandler):
    """Appends log records to a file that its owner alone can read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        super().__init__(os.fdopen(descriptor, "a"))
        self.setFormatter(_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """As any handler, but arguments that do not fit their text are shown beside it."""
        try:
            return super().format(record)
        except Exception:
            text = f"{record.msg!r} {record.args!r}"
            return super().format(logging.LogRecord(record.name, record.levelno, "", 0, text, None, None))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, as logging calls it
        """Nothing: where this file cannot be written, the default would print the record to stderr."""


class OwnAlone(logging.Filter):
    """Lets the records of our own loggers through, and no other."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] in OWN


class GuardedStderr(io.TextIOBase):
    """`sys.stderr` of a command: from when a private log is open, what Python code writes to it goes there alone.

    A warning that bypasses `logging`, a thread's traceback and Python's "exception ignored" come this way. What
    everyone is to read is written to `public`.

    Args:
        public: the stream that everyone may read.
    """

    def __init__(self, public: TextIO) -> None:
        super().__init__()
        self.public = public
        self._lock = threading.RLock()
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.public.encoding

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        logs = current()
        if not logs:
            return self.public.write(text)
        with self._lock:
            *lines, self._rest = re.split(r"[\r\n]", self._rest + text)
        for line in filter(str.strip, lines):
            logs[0].handle(logging.LogRecord("stderr", logging.WARNING, "", 0, line, None, None))
        return len(text)

    def flush(self) -> None:
        self.public.flush()

    def fileno(self) -> int:
        return self.public.fileno()

    def isatty(self) -> bool:
        return not current() and self.public.isatty()


def public_stderr() -> TextIO:
    """The stream for what everyone may read: stderr, guarded or not."""
    stream: Any = sys.stderr
    return stream.public if isinstance(stream, GuardedStderr) else stream


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
    """Send all log records of this process to `path`, in place of an earlier run's file.

    Tracebacks and the records of others than `OWN` go there alone, whichever handlers libraries have made by now.
    """
    root = logging.getLogger()
    for old in current():
        root.removeHandler(old)
        old.stream.close()
    for handler in _handlers():
        if not any(isinstance(each, OwnAlone) for each in handler.filters):
            handler.addFilter(OwnAlone())
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


def _handlers() -> Iterator[logging.Handler]:
    """Those of every logger that there is."""
    for logger in [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            yield from logger.handlers


def current() -> list[PrivateLog]:
    """The private log in use, if any."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, PrivateLog)]
