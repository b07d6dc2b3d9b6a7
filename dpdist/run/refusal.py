"""What a start writes before it may be refused, and how a refused one takes that back.

A run that has begun has files of its last start: where its ranks were, what its time went into. A start that is
refused, as for settings that this run cannot take, was never a part of it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist.run.layout import DONE


class FormerFiles:
    """The files that a start writes before its plan is in the ledger, as they were before it wrote any.

    Args:
        ledger: that of a run that has never begun has no plan: such a run keeps the files of its first start.
    """

    def __init__(self, run: RunDirectory, ledger: Ledger) -> None:
        self._run = run
        self._content: dict[Path, bytes | None] = {}
        for path in () if ledger.plan is None else (run.ranks, run.goodput, run.secret, run.secret_lost):
            with contextlib.suppress(OSError):
                self._content[path] = path.read_bytes() if path.exists() else None
        #: True once the files are as they were.
        self.restored = False

    def forget(self) -> None:
        """The start has begun, and is a part of the run from here on."""
        self._content.clear()

    def restore(self, error: BaseException) -> bool:
        """Bring the files back if `error` refuses the start of a run that had begun.

        Returns:
            Whether that is all there is to do: nobody waits for a run that has ended, so nobody need be told.
        """
        if not self._content or not isinstance(error, InputError):
            return False
        for path, content in self._content.items():
            with contextlib.suppress(OSError):  # it must not hide why the start was refused
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    write_atomically(path, content, mode=0o600)
        self.restored = True
        summary = self._run.read_summary()
        return summary is not None and summary["status"] in DONE
