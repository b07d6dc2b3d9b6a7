"""One process of a training run, whatever started it: the run itself, and the exit code that tells how it went."""

from __future__ import annotations

import logging
import sys
import traceback

from dpdist.cluster.join import abort, leave
from dpdist.cluster.lease import LeaseLostError
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.ledger import LedgerError
from dpdist.run.checkpoint import SaveFailedError
from dpdist.run.private_log import record_exception
from dpdist.trainer import train

#: Errors whose texts are dpdist's own, about files and processes.
QUOTES_NO_DATA = (LedgerError, SaveFailedError, LeaseLostError)
EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 0, 1, 2, 75


def train_here(config: Config) -> int:
    """Train `config` as this process of the job; returns 0 (finished or budget exhausted) or 75 (preempted and saved).

    Any failure ends the process at once, with code 2 for bad input and 1 for the rest.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        summary = train(config)
    except InputError as error:
        log = record_exception(traceback.format_exc())
        more = f" ({log} says more)" if log is not None and error.__cause__ is not None else ""
        print(f"dpdist: error: {error}{more}", file=sys.stderr)
        abort(EXIT_BAD_INPUT)
    except BaseException as error:
        # The text of an exception may quote data, so only its kind is shown where logs are collected, but for ours.
        log = record_exception(traceback.format_exc())
        if log is None:
            traceback.print_exc()
        elif isinstance(error, QUOTES_NO_DATA):
            print(f"dpdist: failed: {error}", file=sys.stderr)
        else:
            kind = type(error).__name__
            if isinstance(error, OSError) and error.strerror:  # the system's words, such as No space left on device
                kind += f" ({error.strerror})"
            print(f"dpdist: failed with {kind}; what it says is in {log}", file=sys.stderr)
        abort(EXIT_FAILED)
    leave()
    return EXIT_PREEMPTED if summary["status"] == "preempted" else EXIT_DONE
