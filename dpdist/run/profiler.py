"""`training.profile`: a trace of some steps by jax.profiler, on process 0, under `private/profile/`.

A trace tells when every operation ran, and with it the size of every sample in it: it is private. It waits for the
devices before its first step and after its last, so that these steps are in it whole; no number changes by that.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)


class Profiler:
    """Starts and ends the trace; what fails is a warning, as no run shall end for it.

    Args:
        steps: the first and the last step to trace, counted from 1; None traces nothing. A run that resumes among them
            traces what is left.
        directory: for the trace; made where it does not exist.
    """

    def __init__(self, steps: list[int] | None, directory: Path) -> None:
        self._first, self._last = steps or (0, 0)
        self._directory = directory
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Call before step `step` (counted from 1) is taken, with the state that it begins from."""
        if self._tracing or not self._first <= step <= self._last:
            return
        jax.block_until_ready(state)
        self._last = self._last if self._call(lambda: jax.profiler.start_trace(self._directory)) else 0
        self._tracing = self._last > 0

    def after(self, step: int, state: Any) -> None:
        """Call after step `step` was dispatched, with the state that it ends in."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End the trace, if one is under way."""
        if self._tracing:
            self._tracing = False
            self._call(jax.profiler.stop_trace)

    def _call(self, function: Any) -> bool:
        try:
            function()
        except (RuntimeError, OSError, ValueError) as error:
            logger.warning("training.profile: %s", error)
            return False
        return True
