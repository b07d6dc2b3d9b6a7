"""What a benchmark says while it goes on, on stderr: its result alone is on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Print a line of progress at once."""
    print(f"dpdist: {line}", file=sys.stderr, flush=True)
