"""The program of a process that reads examples for another one, which `dpdist.data.readers` starts."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from dpdist.config import Data
from dpdist.data.checks import fingerprints
from dpdist.data.datasets import open_dataset
from dpdist.data.sources import BadRecordError, Source, read_rows
from dpdist.errors import InputError

#: Signals that ask a job to leave. This process is needed until the other one has saved.
LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def serve(descriptor: int) -> None:
    """Open the dataset of the first message, a `Data`, and answer with rows to `(part, indices)` till the pipe closes.

    Every answer is `(rows, None, "")`, or `(None, error, what)`: an `InputError` and what its private cause says, or no
    error and the traceback of another one, since not every exception can be sent. The first has fingerprints for rows.
    """
    _be_deaf()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with Connection(descriptor) as pipe:
        parts: dict[str, Source | None] = {}
        while True:
            try:
                request = pipe.recv()
            except EOFError:  # whoever asked has ended
                return
            try:
                rows = _open(request, parts) if isinstance(request, Data) else _read(parts, *request)
                answer: tuple[Any, InputError | None, str] = (rows, None, "")
            except InputError as error:
                private = isinstance(error.__cause__, BadRecordError)
                plain = error.value if isinstance(error.value, str | int | float | None) else str(error.value)
                sent = InputError(error.field, plain, error.remedy)  # a value of the user's may not be one to send
                answer = (None, sent, str(error.__cause__) if private else "")
            except Exception as error:
                answer = (None, None, "".join(traceback.format_exception(error)))
            pipe.send(answer)


def _be_deaf() -> None:
    """Do nothing at the signals above, which are blocked till now; programs that a source starts hear them as usual."""
    for number in LEAVE:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEAVE)


def _end_with(parent: int) -> None:
    """End once the process that started this one has, though an example be under way that never ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _open(data: Data, parts: dict[str, Source | None]) -> dict[str, bytes]:
    dataset = open_dataset(data)
    parts |= {"train": dataset.train, "test": dataset.test}
    return fingerprints(dataset.train, dataset.test)


def _read(parts: dict[str, Source | None], part: str, indices: Any) -> Any:
    source = parts[part]
    assert source is not None
    return read_rows(source, indices)
