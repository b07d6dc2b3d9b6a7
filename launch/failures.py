"""What of a failure is shown where everyone may read it, as on stderr; the rest goes to the private log."""

from __future__ import annotations

import sys
import traceback

from dpdist.errors import InputError
from dpdist.run.events import public_cause
from dpdist.run.private_log import record_exception

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def report_failure(error: BaseException, *, ours: tuple[type[BaseException], ...] = ()) -> int:
    """Say why this process fails, without what may quote data; to be called while `error` is handled.

    Args:
        ours: further errors whose texts are dpdist's own, about files and processes.

    Returns:
        The exit code: 2 for bad input, 1 for the rest.
    """
    log = record_exception(traceback.format_exc())
    if isinstance(error, InputError):
        more = f" ({log} says more)" if log is not None and error.__cause__ is not None else ""
        print(f"dpdist: error: {error}{more}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if log is None:  # no data was read yet
        traceback.print_exc()
    elif isinstance(error, ours):
        print(f"dpdist: failed: {error}", file=sys.stderr)
    else:
        print(f"dpdist: failed with {public_cause(error)}; what it says is in {log}", file=sys.stderr)
    return EXIT_FAILED
