"""The append-only record of what a run may have released, written before it is released.

`ledger.jsonl` holds one `plan` line an incarnation, a `steps` line for each block of steps [start, stop) reserved,
fsynced before the first of them runs, and a `saved` line for each checkpoint on disk. What a run is charged is the
*set* of (incarnation, step) reserved: replaying a lost step with the same sample, noise and parameters reveals nothing
new and costs nothing more; a step reserved and never finished stays charged. Only process 0 writes it, and no step can
finish without process 0, so no result can exist whose step is not in the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class BudgetExhaustedError(RuntimeError):
    """A step was asked for that the plan does not hold; it must not be taken."""


class LedgerError(RuntimeError):
    """The ledger file is damaged beyond a torn last line; nothing may be charged on a guess."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One incarnation's mechanism, fixed before its first step; every field is public.

    In a plain (non-private) run there is no noise, and what it would cost is None.
    """

    incarnation: int
    #: Hex; random, and in every key, so that no two incarnations share a draw.
    nonce: str
    #: JAX version, platform, digest of this code: with others, the same keys may give other bits.
    environment: str
    adjacency: str
    dataset_size: int
    sampling_probability: float
    expected_batch_size: float
    #: Steps the run will take; fewer than `steps_asked` where the budget ends first.
    steps: int
    steps_asked: int
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    delta: float | None = None
    target_epsilon: float | None = None
    epsilon: float | None = None
    epsilon_rdp: float | None = None
    accountant: str | None = None


class Ledger:
    """The ledger file of one run directory, opened by process 0.

    Args:
        path: `ledger.jsonl`; made by `begin` where it does not exist.

    Raises:
        LedgerError: a line other than the last cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan: Plan | None = None
        #: The newest step whose checkpoint is known to be on disk.
        self.saved_step = 0
        self._charged: set[int] = set()
        # Bytes of whole lines, and of the file as this process last saw it.
        self._size = self._seen = 0
        if path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        self._seen = len(raw)
        # A crash can tear the last line; it was not fsynced, so no step of it has run.
        self._size = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[: self._size].splitlines(), 1):
            try:
                record = json.loads(line)
                kind = record.pop("record")
                if kind == "plan":
                    self.plan = Plan(**record)
                elif kind == "steps":
                    self._charged.update(range(record["start"], record["stop"]))
                elif kind == "saved":
                    self.saved_step = max(self.saved_step, int(record["step"]))
                else:
                    raise ValueError(f"unknown record {kind!r}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LedgerError(
                    f"{self.path}, line {number} is damaged ({error}); restore the file from a backup: "
                    "without it, what this run has spent is unknown"
                ) from None

    def begin(self, plan: Plan) -> None:
        """Write the plan of a new run, before its first step; nothing to do where it is written already.

        Raises:
            LedgerError: the file holds another plan.
        """
        if self.plan == plan:
            return
        if self.plan is not None:
            raise LedgerError(f"{self.path} already holds another plan")
        self._append({"record": "plan"} | asdict(plan))
        self.plan = plan

    def reserve(self, start: int, stop: int) -> None:
        """Charge steps [start, stop), durably, before any of them runs.

        Raises:
            BudgetExhaustedError: the block reaches past the plan's last step.
        """
        if self.plan is None:
            raise LedgerError(f"{self.path} holds no plan")
        if not 0 <= start < stop or stop > self.plan.steps:
            raise BudgetExhaustedError(
                f"steps [{start}, {stop}) are not within the {self.plan.steps} that were planned"
            )
        if self._charged.issuperset(range(start, stop)):
            return  # a replay
        self._append({"record": "steps", "incarnation": self.plan.incarnation, "start": start, "stop": stop})
        self._charged.update(range(start, stop))

    def record_saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is on disk, so that going back behind it will be noticed.

        To be written before anything measured on that checkpoint is shown.
        """
        if step > self.saved_step:
            self._append({"record": "saved", "step": step})
            self.saved_step = step

    def charged_steps(self) -> int:
        """The number of distinct steps charged so far."""
        return len(self._charged)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        if self.path.exists() and self.path.stat().st_size != self._seen:
            raise LedgerError(f"{self.path} was changed by another process: two jobs on one run directory")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, self._size)  # drop a torn last line
            if os.pwrite(descriptor, line, self._size) != len(line):
                raise LedgerError(f"{self.path} could not be extended; is the disk full?")
            os.fsync(descriptor)
        finally:
            self._seen = os.fstat(descriptor).st_size  # also of a write that failed half-way
            os.close(descriptor)
        first = self._size == 0
        self._size += len(line)
        if first:  # the name of a new file is not safe on disk until its directory is
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
