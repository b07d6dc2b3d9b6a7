"""One process of a training run, whatever started it: the run itself, and the exit code that tells how it went."""

from __future__ import annotations

import logging
import signal
import sys

from dpdist.cluster.join import abort, leave
from dpdist.config import Config
from dpdist.run.goodput import process_began
from dpdist.run.writer import QUOTES_NO_DATA
from dpdist.trainer import train
from dpdist_launch.failures import report_failure

EXIT_DONE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 75, 128 + signal.SIGINT


def train_here(config: Config) -> int:
    """Train `config` as this process of the job; returns 0 (finished or budget exhausted) or 75 (preempted and saved).

    Any failure ends the process at once, with code 2 for bad input and 1 for the rest.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        summary = train(config, began=process_began())
    except KeyboardInterrupt:  # before the run could take it for a wish to leave
        print("dpdist: interrupted", file=sys.stderr)
        abort(EXIT_INTERRUPTED)
    except BaseException as error:
        abort(report_failure(error, ours=QUOTES_NO_DATA))
    leave()
    return EXIT_PREEMPTED if summary["status"] == "preempted" else EXIT_DONE
