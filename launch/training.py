"""One process of a training run, whatever started it: the run itself, and the exit code that tells how it went."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from typing import TextIO

from dpdist.cluster.join import abort, leave
from dpdist.config import Config
from dpdist.run.goodput import process_began
from dpdist.run.private_log import GuardedStderr, public_stderr
from dpdist.run.writer import QUOTES_NO_DATA
from dpdist.trainer import train
from dpdist_launch.failures import report_failure

EXIT_DONE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 75, 128 + signal.SIGINT


def train_here(config: Config) -> int:
    """Train `config` as this process of the job; returns 0 (finished or budget exhausted) or 75 (preempted and saved).

    Any failure ends the process at once, with code 2 for bad input and 1 for the rest.
    """
    public = _own_stderr()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=public)
    sys.stderr = GuardedStderr(public)  # for good: even at its end, Python tells of what no longer finds a place
    try:
        summary = train(config, began=process_began())
    except KeyboardInterrupt:  # before the run could take it for a wish to leave
        print("dpdist: interrupted", file=public_stderr())
        abort(EXIT_INTERRUPTED)
    except BaseException as error:
        abort(report_failure(error, ours=QUOTES_NO_DATA))
    leave()
    return EXIT_PREEMPTED if summary["status"] == "preempted" else EXIT_DONE


def _own_stderr() -> TextIO:
    """stderr by a descriptor of its own, so that descriptor 2 can be silenced where a C library writes of a record."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
    except io.UnsupportedOperation:  # a stream in memory
        return sys.stderr
