"""A job whose ranks are forks of a process that has imported everything: seconds faster to start, and nothing ends
the others where one fails. So this does what the launcher does: the first failure ends all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from jobs import Jobs, Run, Running

#: As the real launcher's.
GRACE, PREEMPTED = 3.0, 75


def has_ended(pid: int) -> bool:
    """Whether a process, which nobody may have waited for, runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def end(pid: int) -> None:
    """SIGKILL to a rank and what it has started; nothing where it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class ForkedJob:
    """The ranks of one job, started at once."""

    def __init__(self, jobs: Jobs, run: Run, processes: int, *overrides: str, **environ: str) -> None:
        self._ranks: list[Running] = jobs.ranks(run, processes, 1, *overrides, **environ)
        #: Exit codes of those that have been waited for: their process ids may belong to others by now.
        self._codes: dict[int, int | None] = {}

    def pid(self, rank: int) -> int | None:
        """The process of a rank, while it runs."""
        pid = self._ranks[rank].pid
        return None if rank in self._codes or has_ended(pid) else pid

    def signal_all(self, number: int) -> None:
        """The preemption notice, or what else all shall get."""
        for rank in range(len(self._ranks)):
            if (pid := self.pid(rank)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def running(self) -> bool:
        """Whether any rank is."""
        return any(self.pid(rank) is not None for rank in range(len(self._ranks)))

    def wait(self, seconds: float) -> int | None:
        """The exit code of the job by the launcher's rules; None where it was still running and has been ended."""
        deadline, failed = time.monotonic() + seconds, None
        while len(self._codes) < len(self._ranks):
            for number, rank in enumerate(self._ranks):
                if number not in self._codes and has_ended(rank.pid):
                    code = self._codes[number] = rank.exit_code(5.0)
                    if code not in (0, PREEMPTED) and failed is None:
                        failed = 128 - code if code is not None and code < 0 else code
                        deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                self.end()
                return failed
            time.sleep(0.01)
        return failed if failed is not None else max(code or 0 for code in self._codes.values())

    def end(self) -> None:
        """SIGKILL to all that still run, and to what they have started."""
        for number, rank in enumerate(self._ranks):
            if number not in self._codes:
                end(rank.pid)
                self._codes[number] = rank.exit_code(5.0)

    def stderr(self) -> str:
        """What all have said."""
        return "\n".join(f"--- rank {n}\n{rank.stderr.read_text()}" for n, rank in enumerate(self._ranks))

    def forget(self) -> None:
        """Remove what was said."""
        for rank in self._ranks:
            rank.stdout.unlink(missing_ok=True)
            rank.stderr.unlink(missing_ok=True)
