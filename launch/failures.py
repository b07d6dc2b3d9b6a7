"""What of a failure is shown where everyone may read it, as on stderr; the rest goes to the private log."""

from __future__ import annotations

import re
import traceback

from dpdist.errors import InputError
from dpdist.run.events import public_cause
from dpdist.run.private_log import public_stderr, record_exception

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
#: The words with which XLA begins a message. They quote nothing.
_STATUS = {
    "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED",
}  # fmt: skip
#: How collectives and JAX's coordination service report that another process is gone.
_BROKEN = re.compile(
    r"(Gloo|NCCL) .{0,200}(failed|error)|Connection (closed|reset) by peer|coordination service", re.DOTALL
)
#: What is said then; `dpdist_launch.slurm.deaths` looks for the cause elsewhere.
ECHO = "a connection to another rank broke"


def report_failure(error: BaseException, *, ours: tuple[type[BaseException], ...] = ()) -> int:
    """Say why this process fails, without what may quote data; to be called while `error` is handled.

    Args:
        ours: further errors whose texts are dpdist's own, about files and processes.

    Returns:
        The exit code: 2 for bad input, 1 for the rest.
    """
    bad_input = isinstance(error, InputError)
    whole = not bad_input or error.__cause__ is not None  # the text of an InputError says it all
    log = record_exception(traceback.format_exc() if whole else f"dpdist: error: {error}")
    if bad_input:
        more = f" ({log} says more)" if log is not None and error.__cause__ is not None else ""
        print(f"dpdist: error: {error}{more}", file=public_stderr())
        return EXIT_BAD_INPUT
    if isinstance(error, ours):
        print(f"dpdist: failed: {error}", file=public_stderr())
    elif log is None:  # no data was read yet
        traceback.print_exc()
    else:
        print(
            f"dpdist: failed with {public_cause(error)}{_status(str(error))}; what it says is in {log}",
            file=public_stderr(),
        )
    return EXIT_FAILED


def _status(text: str) -> str:
    """What of an exception's text is safe to show: XLA's status word, and whether the text is about another process."""
    word = text.partition(":")[0]
    parts = [word] if word in _STATUS else []
    if parts and _BROKEN.search(text):
        parts.append(ECHO)
    return f" ({', '.join(parts)})" if parts else ""
