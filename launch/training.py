"""One process of a training run, whatever started it: the run itself, and the exit code that tells how it went."""

from __future__ import annotations

import logging

from dpdist.cluster.join import abort, leave
from dpdist.cluster.lease import LeaseLostError
from dpdist.cluster.rendezvous import MissingRanksError
from dpdist.config import Config
from dpdist.mechanism.ledger import LedgerError
from dpdist.run.checkpoint import SaveFailedError
from dpdist.trainer import train
from dpdist_launch.failures import report_failure

#: Errors whose texts are dpdist's own, about files and processes.
QUOTES_NO_DATA = (LedgerError, SaveFailedError, LeaseLostError, MissingRanksError)
EXIT_DONE, EXIT_PREEMPTED = 0, 75


def train_here(config: Config) -> int:
    """Train `config` as this process of the job; returns 0 (finished or budget exhausted) or 75 (preempted and saved).

    Any failure ends the process at once, with code 2 for bad input and 1 for the rest.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        summary = train(config)
    except BaseException as error:
        abort(report_failure(error, ours=QUOTES_NO_DATA))
    leave()
    return EXIT_PREEMPTED if summary["status"] == "preempted" else EXIT_DONE
