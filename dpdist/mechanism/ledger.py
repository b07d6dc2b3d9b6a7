"""The append-only record of what a run may have released, written before it is released.

`ledger.jsonl` holds one `plan` line an incarnation, a `steps` line for each block of steps [start, stop) reserved,
fsynced before the first of them runs, and a `saved` line for each checkpoint on disk. What a run is charged is the
*set* of (incarnation, step) reserved: replaying a lost step with the same sample, noise and parameters reveals nothing
new and costs nothing more; a step reserved and never finished stays charged, also after a later incarnation has gone
back behind it. Only process 0 writes the ledger, and no step can finish without process 0, so no result can exist whose
step is not in the file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


class BudgetExhaustedError(RuntimeError):
    """A step was asked for that the plan does not hold; it must not be taken."""


class LedgerError(RuntimeError):
    """The ledger file is damaged beyond a torn last line; nothing may be charged on a guess."""


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """What only a private incarnation has: its noise, and what that costs."""

    #: C, the largest L2 norm that an example's gradient keeps.
    clip_norm: float
    #: sigma; the noise on the sum of clipped gradients has standard deviation sigma * C.
    noise_multiplier: float
    delta: float
    #: The epsilon that the run must not pass; None where only the noise multiplier was given.
    target_epsilon: float | None = None
    #: Of everything charged before this incarnation, and of all steps of its plan.
    epsilon: float
    epsilon_rdp: float
    accountant: str
    #: The Renyi order at which changes of the plan are charged: chosen with the first plan, and kept.
    renyi_order: int
    #: g and rho of `dpdist.mechanism.grid`. None in ledgers from before there was a grid: then sums were float32.
    grid: float | None = None
    grid_slack: float = 0.0

    @property
    def noise_scale(self) -> float:
        """The standard deviation of the noise on the sum: sigma times the sensitivity C (1 + rho), rounded up."""
        return self.noise_multiplier * self.clip_norm * (1 + self.grid_slack) * (1 + 2.0**-50)


_TERMS = tuple(term.name for term in fields(PrivacyTerms))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One incarnation's mechanism, fixed before its first step; every field is public."""

    incarnation: int
    #: Hex; random, and in every key, so that no two incarnations share a draw.
    nonce: str
    #: JAX version, platform, digest of this code: with others, the same keys may give other bits.
    environment: str
    adjacency: str
    dataset_size: int
    #: d, the number of single parameters that train; 0 in ledgers from before it was noted.
    coordinates: int = 0
    sampling_probability: float
    expected_batch_size: float
    #: The last step this incarnation will take; before `steps_asked` where the budget ends first.
    steps: int
    steps_asked: int
    #: None in a plain (non-private) run, which adds no noise.
    privacy: PrivacyTerms | None = None
    #: The first step of this incarnation; those before it were taken by earlier ones.
    start: int = 0
    #: What changed, so that a new incarnation had to begin; empty for the first.
    reasons: Sequence[str] = field(default_factory=list)
    #: What else a step depends on, to notice that it changed: digests of the config and of the code of model and
    #: optimizer, and one of the training data that is keyed by the secret (a plain one would let anyone confirm a guess
    #: of the data).
    settings: str = ""
    code: str = ""
    data: str = ""
    #: The same of the test data, which may not change: a record must not be trained on first and tested on then. Empty
    #: in ledgers of before.
    test_data: str = ""
    #: The older checkpoint that the user asked to go back to, when this incarnation began.
    resume_step: int | None = None
    #: True where the secret is a known seed: no guarantee holds.
    insecure: bool = False

    def private_terms(self) -> PrivacyTerms:
        """The terms of an incarnation whose steps shall be charged.

        Raises:
            LedgerError: it is a plain one: no epsilon covers steps without noise.
        """
        if self.privacy is None:
            raise LedgerError(f"incarnation {self.incarnation} adds no noise, so no epsilon covers its steps")
        return self.privacy

    def to_record(self) -> dict[str, Any]:
        """The plan as the ledger and the checkpoints keep it: flat JSON, the terms null in a plain run."""
        record = asdict(self)
        return record | (record.pop("privacy") or dict.fromkeys(_TERMS))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], first: Plan | None = None) -> Plan:
        """The inverse of `to_record`.

        Args:
            first: the run's first plan, whose Renyi order is that of later records without one, as they once were.

        Raises:
            TypeError: a field is missing or unknown, or only some of the terms are there.
        """
        terms = {name: record[name] for name in _TERMS if record.get(name) is not None}
        if terms and first is not None and first.privacy is not None:
            terms.setdefault("renyi_order", first.privacy.renyi_order)
        rest = {name: value for name, value in record.items() if name not in _TERMS}
        return cls(**rest, privacy=PrivacyTerms(**terms) if terms else None)


def file_identity(path: Path) -> dict[str, Any]:
    """What a file keeps where it is moved and a copy has of its own: its number, and when it was born.

    A file system may give a number again once its file is deleted, as before a restore from a backup, so the number
    alone is not enough. The device's number would not do: nodes differ in it. `born` is None where the system does not
    tell: then the number has to do.
    """
    statx, found = getattr(ctypes.CDLL(None), "statx", None), (ctypes.c_uint64 * 32)()  # Linux, statx(2): 256 bytes
    at_cwd, btime = -100, 0x800
    told = statx is not None and statx(at_cwd, os.fsencode(path), 0, btime, found) == 0 and found[0] & btime
    born = f"{found[10]}.{found[11] & 0xFFFFFFFF:09}" if told else getattr(path.stat(), "st_birthtime", None)
    return {"file": path.stat().st_ino, "born": born}


class Ledger:
    """The ledger file of one run directory, opened by process 0.

    Args:
        path: `ledger.jsonl`; made by `begin` where it does not exist.

    Raises:
        LedgerError: a line other than the last cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: All incarnations, oldest first.
        self.plans: list[Plan] = []
        #: The newest step of the current incarnation whose checkpoint is known to be on disk, or where it began.
        self.saved_step = 0
        #: True where the file is not the one that the current incarnation began in: the directory is a copy.
        self.copied = False
        self._charged: list[set[int]] = []
        # Bytes of whole lines, and of the file as this process last saw it: more where its last line is torn.
        self._size = self._seen = 0
        if path.exists():
            self._read()

    @property
    def plan(self) -> Plan | None:
        """The current incarnation's."""
        return self.plans[-1] if self.plans else None

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
                    file = {name: record.pop(name, None) for name in ("file", "born")}
                    self._add(Plan.from_record(record, self.plans[0] if self.plans else None), file)
                elif kind == "steps":
                    self._charged[int(record["incarnation"])].update(range(record["start"], record["stop"]))
                elif kind == "saved":
                    self._note_saved(int(record["incarnation"]), int(record["step"]))
                else:
                    raise ValueError(f"unknown record {kind!r}")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise LedgerError(
                    f"{self.path}, line {number} is damaged ({error}), so what this run has spent is unknown; name a "
                    "new run.dir, or bring the file back as it was last: in an older copy, such as a backup, what was "
                    "spent since is missing"
                ) from None

    def _add(self, plan: Plan, file: Mapping[str, Any]) -> None:
        if plan.incarnation != len(self.plans):
            raise ValueError(f"incarnation {plan.incarnation} follows {len(self.plans) - 1}")
        self.plans.append(plan)
        self._charged.append(set())
        self.saved_step = plan.start
        now = file_identity(self.path)
        self.copied = any(None not in (file[name], now[name]) and file[name] != now[name] for name in file)

    def begin(self, plan: Plan) -> None:
        """Write the plan of a new incarnation, before its first step; nothing to do where it is written already.

        Raises:
            LedgerError: the file holds another plan under that number, another incarnation has that nonce, or the plan
                costs more than its own target.
        """
        if self.plan == plan:
            return
        if plan.incarnation != len(self.plans):
            raise LedgerError(f"{self.path} already holds another plan, for {len(self.plans)} incarnation(s)")
        if any(earlier.nonce == plan.nonce for earlier in self.plans):
            raise LedgerError(f"{self.path}: two incarnations must not share a nonce, or they would share their noise")
        terms = plan.privacy
        if terms is not None and terms.target_epsilon is not None and terms.epsilon > terms.target_epsilon:
            raise LedgerError(f"a plan of epsilon {terms.epsilon:.6g} is above its target {terms.target_epsilon:g}")
        self._append({"record": "plan"} | plan.to_record(), stamp=True)
        self._add(plan, {})

    def reserve(self, start: int, stop: int) -> None:
        """Charge steps [start, stop), durably, before any of them runs.

        Raises:
            BudgetExhaustedError: the block reaches past the plan's last step, or before its first.
        """
        plan = self.plan
        if plan is None:
            raise LedgerError(f"{self.path} holds no plan")
        if not plan.start <= start < stop or stop > plan.steps:
            raise BudgetExhaustedError(
                f"steps [{start}, {stop}) are not within the {plan.steps} that were planned (from {plan.start} on)"
            )
        charged = self._charged[-1]
        if charged.issuperset(range(start, stop)):
            return  # a replay
        self._append({"record": "steps", "incarnation": plan.incarnation, "start": start, "stop": stop})
        charged.update(range(start, stop))

    def record_saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is on disk, so that going back behind it will be noticed.

        To be written before anything measured on that checkpoint is shown.
        """
        if step > self.saved_step:
            incarnation = len(self.plans) - 1
            self._append({"record": "saved", "incarnation": incarnation, "step": step})
            self._note_saved(incarnation, step)

    def _note_saved(self, incarnation: int, step: int) -> None:
        if self.plans[incarnation] is self.plans[-1]:
            self.saved_step = max(self.saved_step, step)

    def charged_steps(self) -> int:
        """The number of (incarnation, step) pairs charged so far."""
        return sum(map(len, self._charged))

    def charged_to(self, incarnation: int) -> int:
        """The number of distinct steps charged to one incarnation."""
        return len(self._charged[incarnation])

    def is_ancestor(self, incarnation: int, step: int) -> bool:
        """Whether (incarnation, step) is an ancestor of the current incarnation.

        False where a later incarnation has gone back behind it.

        Raises:
            LedgerError: the ledger does not charge that incarnation for these steps.
        """
        known = incarnation < len(self.plans)
        if not known or not self._charged[incarnation].issuperset(range(self.plans[incarnation].start, step)):
            raise LedgerError(f"{self.path} does not charge incarnation {incarnation} for the steps up to {step}")
        return all(step <= later.start for later in self.plans[incarnation + 1 :])

    def _append(self, record: dict[str, Any], *, stamp: bool = False) -> None:
        # Appending cannot erase what somebody else has charged since this process looked, only add to it.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            file = os.fstat(descriptor)
            if file.st_size != self._seen:
                raise LedgerError(f"{self.path} was changed by another process: two jobs on one run directory")
            if self._seen > self._size:  # a line torn by a crash, or by a write of ours that failed half-way
                os.ftruncate(descriptor, self._size)
            if stamp:
                record = record | file_identity(self.path)
            line = (json.dumps(record) + "\n").encode()
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            self._seen = self._size + len(line)
        except OSError as error:
            raise LedgerError(
                f"{self.path} could not be extended ({error.strerror}), and no step may run uncharged; mend that and "
                "run the same command again: nothing is lost"
            ) from error
        finally:
            os.close(descriptor)
        first = self._size == 0
        self._size += len(line)
        if first:  # the name of a new file is not safe on disk until its directory is
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
