"""What all private runs on a dataset cost together: an append-only file, with a budget that no run may pass.

`DIR/NAME.jsonl` begins with a `registry` line: the dataset's name, the delta and Renyi order of the joint guarantee,
and the epsilon that is not to be passed, if there is one. The owner of the data writes it once (`dpdist privacy
registry --create`), and no run does: neither its config nor a mistyped name or an unmounted disk moves the wall. Each
`charge` line after it holds the incarnations of one run, by nonce, with the steps that they plan or were charged. Every
line has the digest of the one before it, so that a line that is changed or taken out of the middle shows. One that is
taken off the end, or the whole file, shows by `NAME.head`, which has the digest of a line that must be there, and to
the run that it belongs to (`dpdist.joint.charging`). Against somebody who rewrites all of these, only file permissions
help.

What counts of an incarnation is the most that any line says. Nothing is ever given back: where a run is changed on its
way, the rest of its former plan stays charged, since a copy of its directory may be taking it.

Lines are appended under a lock that ends with its process, fsynced, after a check that the file still ends where it was
read. A torn last line was followed by no step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.joint.charging import PATIENCE
from dpdist.joint.together import Charges, wall_cost
from dpdist.mechanism.accounting import KEPT, ORDERS
from dpdist.mechanism.composition import Phase
from dpdist.run.directory import write_atomically

_FIRST = "0" * 64


@dataclass
class Charged:
    """One run and its copies, as the registry has them."""

    run_dir: str
    delta: float
    #: The Renyi order that the run chose with its first plan.
    order: int
    unit: str
    #: The most records that a unit brings; None where the unit is a record, or in lines from before it was noted.
    records_per_unit: int | None
    #: What says which records it is tested on, by setting; empty where it is not known.
    split: dict[str, Any]
    dataset_size: int
    first: Phase
    #: By nonce.
    incarnations: dict[str, Phase] = field(default_factory=dict)

    @property
    def charges(self) -> Charges:
        phases = tuple(self.incarnations.values())
        return Charges(first=self.first, phases=phases, delta=self.delta, order=self.order)


class Registry:
    """The registry of one dataset, as it is on disk.

    Args:
        folder: `run.registry`.
        dataset: `run.registry_dataset`.

    Raises:
        InputError: a line other than a torn last one cannot be read, or was changed.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.path = folder / f"{dataset}.jsonl"
        #: By the nonce of their first incarnation, in the order in which they came.
        self.runs: dict[str, Charged] = {}
        #: Of the joint guarantee; None as long as there is no file.
        self.delta: float | None = None
        self.order: int | None = None
        #: The epsilon that is not to be passed; None is no wall.
        self.budget: float | None = None
        #: Digests of all lines.
        self.digests: list[str] = []
        self._size = self._seen = 0
        # The head first: by the time it is written, its line is in the file.
        head = self._head()
        self._read()
        if head is not None and head not in self.digests:
            remedy = (
                f"lacks a line that {self.head.name} says was written: the file was cut or is gone, so what was spent "
                f"on {self.dataset} is unknown. Bring it back as it was last; an older copy lacks what was spent since."
            )
            raise InputError("run.registry", str(self.path), remedy)

    @property
    def head(self) -> Path:
        """The file with the digest of the newest line, or of one before it."""
        return self.folder / f"{self.dataset}.head"

    def _head(self) -> str | None:
        try:
            return self.head.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError("run.registry", str(self.head), f"cannot be read ({error}).") from None

    def _read(self) -> None:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError("run.registry", str(self.path), f"cannot be read ({error.strerror}).") from None
        self._seen, self._size = len(raw), raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[: self._size].splitlines(), 1):
            try:
                record = json.loads(line)
                if record["previous"] != (self.digests[-1] if self.digests else _FIRST):
                    raise ValueError("the line before it was changed or taken out")
                if record["record"] == "registry" and number == 1:
                    self._take_header(record)
                elif record["record"] == "charge" and number > 1:
                    self._take(record)
                else:
                    raise ValueError(f"{record['record']!r} is not what stands there")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                remedy = (
                    f"line {number} is damaged ({error}), so what was spent on {self.dataset} is unknown, and no run "
                    "may start; bring the file back as it was last: an older copy lacks what was spent since."
                )
                raise InputError("run.registry", str(self.path), remedy) from None
            self.digests.append(hashlib.sha256(line).hexdigest())

    def _take_header(self, record: dict[str, Any]) -> None:
        if record["dataset"] != self.dataset:
            raise ValueError(f"it is that of {record['dataset']!r}")
        self.delta, self.order, budget = float(record["delta"]), int(record["order"]), record["budget"]
        self.budget = None if budget is None else float(budget)
        if not 0 < self.delta < 1 or self.order < 2 or (budget is not None and not float(budget) > 0):
            raise ValueError("its numbers make no sense")

    def _take(self, record: dict[str, Any]) -> None:
        """Count a charge: the most that any line says of an incarnation."""
        phases = {nonce: Phase(float(q), float(sigma), int(steps)) for nonce, q, sigma, steps in record["incarnations"]}
        first = Phase(float(record["first"][0]), float(record["first"][1]), int(record["first"][2]))
        sound = all(0 < p.sampling_probability <= 1 and p.noise_multiplier > 0 for p in (first, *phases.values()))
        if not sound or any(p.steps < 0 for p in (first, *phases.values())) or not 0 < float(record["delta"]) < 1:
            raise ValueError("its numbers make no sense")
        run = self.runs.setdefault(
            record["run"],
            Charged(
                run_dir=str(record["run_dir"]),
                delta=float(record["delta"]),
                order=int(record["order"]),
                unit=str(record["unit"]),
                records_per_unit=record.get("records_per_unit"),
                split=dict(record["split"]),
                dataset_size=int(record["dataset_size"]),
                first=first,
            ),
        )
        for nonce, phase in phases.items():
            before = run.incarnations.get(nonce)
            if before is not None and not before.alike(phase):
                raise ValueError("an incarnation has two kinds of steps")
            if before is None or before.steps < phase.steps:
                run.incarnations[nonce] = phase

    @property
    def torn(self) -> bool:
        """Whether a last line is not whole: it was never charged, and the next one replaces it."""
        return self._seen > self._size

    def cost(self) -> float:
        """The joint epsilon of all that is charged, at the registry's delta; 0 without any."""
        if self.delta is None or self.order is None or not self.runs:
            return 0.0
        return wall_cost([run.charges for run in self.runs.values()], order=self.order, delta=self.delta)

    def cost_with(self, record: dict[str, Any]) -> float:
        """The joint epsilon with one more charge."""
        with_it = Registry(self.folder, self.dataset)
        with_it._take(record)
        return with_it.cost()

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether all of a charge is in it already."""
        run = self.runs.get(record["run"])
        return run is not None and all(
            nonce in run.incarnations and run.incarnations[nonce].steps >= steps
            for nonce, _, _, steps in record["incarnations"]
        )

    def require_room(self, record: dict[str, Any]) -> None:
        """Check that a charge would not pass the budget. What is charged already has been checked.

        Raises:
            InputError: it would, or the run promises to another unit than those before it.
        """
        self.require_made()
        if self.holds(record):
            return
        self.require_alike(record)
        if self.budget is None:
            return
        spent, cost = self.cost(), self.cost_with(record)
        if cost > self.budget:
            remedy = (
                f"its budget is epsilon {self.budget:g} at delta {self.delta:g}; {spent:.4g} is spent on "
                f"{len(self.runs)} run(s), and with this one it would be {cost:.4g}. No step was taken. Ask for fewer "
                "steps or more noise; who owns the data decides on the budget."
            )
            raise InputError("run.registry_dataset", self.dataset, remedy)

    def require_made(self) -> None:
        """Check that there is such a registry: one made by a run would have no budget, wherever the name was wrong.

        Raises:
            InputError: there is none.
        """
        if self.delta is None:
            remedy = (
                f"{self.path} is no registry (yet), so what may be spent is unknown. Is the name right, and its file "
                f"system mounted? If so, the owner of the data makes it once: dpdist privacy registry {self.folder} "
                f"--create {self.dataset} --delta DELTA [--budget EPSILON]."
            )
            raise InputError("run.registry_dataset", self.dataset, remedy)

    def require_alike(self, record: dict[str, Any]) -> None:
        """Check that a run promises to the unit, and is tested on the records, that those before it are.

        Raises:
            InputError: it does not.
        """
        for run in self.runs.values():
            if run.unit != record["unit"]:
                remedy = (
                    f"the registry's runs promise to {run.unit}, this one to {record['unit']}; no joint epsilon covers "
                    "both. Keep to one unit, or give the other one a registry_dataset and a budget of its own."
                )
                raise InputError("run.registry_dataset", self.dataset, remedy)
        if (name := split_differs([run.split for run in self.runs.values()], record["split"])) is not None:
            known = next(run.split[name] for run in self.runs.values() if run.split)
            remedy = (
                f"is {known!r} in the registry's runs: records that one of them trains on would be tested on by this "
                "one, which publishes its accuracy on them exactly. No epsilon covers that; take the same split."
            )
            raise InputError(name, record["split"][name], remedy)

    def append(self, record: dict[str, Any]) -> str:
        """Add a line, durably; within `locked`. Returns its digest."""
        line = json.dumps(record | {"previous": self.digests[-1] if self.digests else _FIRST}).encode()
        try:
            descriptor = _open_shared(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                if os.fstat(descriptor).st_size != self._seen:
                    raise OSError(errno.EBUSY, "it was changed by somebody who does not keep to its lock")
                if self._seen > self._size:  # a line torn by a crash
                    os.ftruncate(descriptor, self._size)
                if os.write(descriptor, line + b"\n") != len(line) + 1:
                    os.ftruncate(descriptor, self._size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not self.digests:  # the name of a new file is not safe on disk until its directory is
                directory = os.open(self.folder, os.O_RDONLY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            digest = hashlib.sha256(line).hexdigest()
            write_atomically(self.head, digest + "\n", mode=_mode_in(self.folder))
        except OSError as error:
            remedy = f"cannot be extended ({error.strerror}), and no step may run uncharged; mend that and start again."
            raise InputError("run.registry", str(self.path), remedy) from error
        self.digests.append(digest)
        self._size = self._seen = self._size + len(line) + 1
        return digest


def split_differs(known: Sequence[dict[str, Any]], split: dict[str, Any]) -> str | None:
    """The setting, if any, in which a split is another than one of those that are known."""
    return next((name for each in known if each for name in split if each[name] != split[name]), None)


def _mode_in(folder: Path) -> int:
    """For a new file: whoever may make files in the directory may write it."""
    return 0o664 if folder.stat().st_mode & 0o020 else 0o644


def _open_shared(path: Path, flags: int) -> int:
    """Open a file, or make one that all who may write the directory may write."""
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        os.fchmod(descriptor, _mode_in(path.parent))
        return descriptor


@contextlib.contextmanager
def locked(folder: Path, dataset: str, patience: float = PATIENCE, *, new: bool = False) -> Iterator[Registry]:
    """The registry, which nobody else writes to within the block.

    Args:
        new: it may be one that is not there yet.

    Raises:
        InputError: it is not there, somebody else holds it for longer than `patience` seconds, or the directory cannot
            be written.
    """
    if not new:
        Registry(folder, dataset).require_made()
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_shared(folder / f"{dataset}.lock", os.O_RDWR)
    except OSError as error:
        raise InputError("run.registry", str(folder), f"cannot be written ({error.strerror}).") from None
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > deadline:
                    remedy = f"its lock cannot be taken ({error.strerror}); locks must work on its file system."
                    raise InputError("run.registry", str(folder), remedy) from None
                time.sleep(0.05)
        yield Registry(folder, dataset)
    finally:
        os.close(descriptor)


def create(folder: Path, dataset: str, *, delta: float, budget: float | None) -> None:
    """Write the first line of a registry, for the owner of the data.

    Raises:
        InputError: there is one already, which nobody may change, or a number makes no sense.
    """
    if not 0 < delta < 1:
        raise InputError("--delta", delta, "give a number between 0 and 1.")
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        raise InputError("--budget", budget, "give a positive, finite epsilon.")
    with locked(folder, dataset, new=True) as registry:
        if registry.delta is not None:
            raise InputError("--create", dataset, f"{registry.path} is there already, and its first line stays.")
        order = _order_for(budget, delta)
        registry.append({"record": "registry", "dataset": dataset, "delta": delta, "order": order, "budget": budget})


def _order_for(budget: float | None, delta: float) -> int:
    """A Renyi order at which plans that fill the budget are cheap: the best one where divergences are rho alpha."""
    wanted = 1 - 2 * (math.log(KEPT) + math.log(delta)) / (8.0 if budget is None else budget)
    return min(ORDERS, key=lambda order: abs(order - wanted))
