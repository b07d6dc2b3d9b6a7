"""The lease on a run directory: at most one job at a time may train a run.

Two live jobs on one run would use the same sampling and noise keys for different parameters, which breaks the
guarantee.

A directory holds files `lease.N`. The process that created the one with the highest N (the generation) owns the run; to
take over, a process creates `lease.N+1`. We hold no file-system lock, so none outlives a dead node, and we never
compare the clocks of two hosts. Why two processes never own the run at once:

* *Two contenders create N+1.* `link` gives a complete file its name only if that name is free, so exactly one succeeds.
* *A contender slept after reading N, while N+1 was created and removed.* It creates N+1 again, reads the directory,
  finds a higher generation and withdraws. A file is removed only by a process that has seen a higher one, so the
  highest generation never decreases. To miss the higher file, the contender would have to overlap two more takeovers
  while it reads one small directory, because each owner keeps the file of the generation before its own.
* *An owner resumes after its lease was taken.* A lease is taken from an owner that may be alive only after `timeout`
  seconds without a heartbeat on the new owner's clock. If the old owner wakes up, its `check` finds the higher
  generation, and its heartbeats go to its own file only. Its ownership ended when the new owner's `link` succeeded.

Not guaranteed: an owner that freezes between `check` and the write that follows, or is killed during a write, may still
complete that one write, so every such write must be harmless. A checkpoint is: the new owner's replay computes the same
one from the same samples and noise. An appended ledger line is: it can only charge more. (A write that first truncates
the file would not be.) Live clones of one machine, with the same host name and boot id, count as one machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dpdist.cluster.holder import Holder
from dpdist.errors import InputError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"lease\.([1-9][0-9]*)")
#: Heartbeats per timeout: several may be late before the owner is considered dead.
_BEATS = 6
#: Seconds that a killed process of this host may take to disappear; one that is still there then counts as alive.
_DYING = 0.5
#: Seconds that a former start of the same SLURM job may take to end, by JAX's heartbeat (100 s) or SLURM's KillWait.
_LEAVING = 150.0
#: Errors of `link` on file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
#: Errors of reading a removed file; NFS reports one that another host has removed as stale, not as missing.
_GONE = (errno.ENOENT, errno.ESTALE)


class LeaseLostError(RuntimeError):
    """This process no longer owns the run directory and must not write into it any more."""


class Lease:
    """Ownership of a run directory, held by process 0 of a job. Call `acquire` to get one; a context manager.

    A daemon thread writes a heartbeat every `timeout / 6` seconds, so `timeout` must exceed the longest time for which
    C code may hold the GIL.
    """

    def __init__(self, directory: Path, generation: int, holder: Holder) -> None:
        self.directory, self.generation = directory, generation
        #: The dead holder whose lease was taken over, and how its death was noticed; None if the lease was free.
        self.taken_from: str | None = None
        self._path = _path(directory, generation)
        self._holder = holder
        self._acquired_at = time.monotonic()
        self._lost: str | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def acquire(cls, directory: str | Path, timeout: float) -> Lease:
        """Take the lease on `directory`; waits only if the holder may be a dead process of another host, or is about to
        end as a former start of this SLURM job.

        Args:
            directory: an existing directory for the lease files, shared by all hosts that may contend.
            timeout: seconds without a heartbeat after which a holder on another host counts as dead. If the holder's
                own timeout is longer, that one is used.

        Raises:
            InputError: a live process holds the lease, or the directory cannot be used.
        """
        directory = Path(directory)
        try:
            here = Holder.of_this_process(directory, timeout)
            return cls._take_when_free(directory, here)
        except OSError as error:
            raise InputError(
                "run.dir",
                str(directory),
                f"its lease cannot be read or written ({error.strerror}); check the file system, or name another.",
            ) from None

    @classmethod
    def _take_when_free(cls, directory: Path, here: Holder) -> Lease:
        watched: tuple[int, bytes] | None = None
        since, began, told = 0.0, time.monotonic(), False
        while True:
            # Read the clock before the file. If this process freezes in between, it must not count the time it was
            # frozen as silence of the owner.
            now = time.monotonic()
            generation, raw = _newest(directory)
            holder = Holder.decode(raw)
            reason = None
            if generation and not (holder and holder.released):
                who = str(holder) if holder else f"an unknown owner ({_path(directory, generation).name} is damaged)"
                alive = holder.is_alive(here) if holder else None
                if watched is None or watched[0] != generation:
                    watched, since = (generation, raw), now
                if alive and now - since < _DYING:
                    time.sleep(_DYING / 10)
                    continue
                if (alive or raw != watched[1]) and holder and here.is_start_after(holder) and now - began < _LEAVING:
                    if not told:
                        logger.warning("%s: waiting for %s, a former start of this job, to end", directory, holder)
                    watched, told = None, True
                    time.sleep(_DYING)
                    continue
                if alive or raw != watched[1]:
                    raise InputError(
                        "run.dir",
                        str(directory),
                        f"is in use by {who}; wait for it to end, cancel it, or name another run.dir.",
                    )
                patience = max(here.timeout, holder.timeout if holder else 0.0)
                if alive is None and now - since < patience:
                    time.sleep(min(1.0, here.timeout / 20, patience - (now - since)))
                    continue
                reason = f"{who}, " + ("no longer runs" if alive is False else f"gave no sign for {patience:g} s")
            lease = cls(directory, generation + 1, here)
            if lease._create():
                if reason:
                    lease.taken_from = reason
                    logger.warning("%s: took over the lease of %s", directory, reason)
                lease._thread.start()
                return lease

    def check(self) -> None:
        """Raise unless this process still owns the directory; call it before every write that another job could see.

        It reads one small directory and one small file.

        Raises:
            LeaseLostError: another job has taken over, the lease was removed or released, or it cannot be read.
        """
        if self._lost is None:
            try:
                self._lost = self._why_lost()
            except OSError as error:
                raise LeaseLostError(f"{self._path} cannot be read ({error.strerror}): who owns the run?") from error
        if self._lost is not None:
            raise LeaseLostError(f"{self._lost}; this job must not go on writing into the run")

    def last_sign_of_predecessor(self) -> float | None:
        """When a holder that died wrote its last heartbeat, by the clock of the file system; None if none has died."""
        if self.taken_from is None:
            return None
        try:
            return _path(self.directory, self.generation - 1).stat().st_mtime
        except OSError:
            return None

    def release(self) -> None:
        """Release the lease, so that the next job can start at once. Does nothing if it was released or lost before."""
        if self._ended.is_set():
            return
        self._ended.set()
        # A heartbeat may hang in a dead file system; do not hang with it. The next job then waits for the timeout.
        if not self._writing.acquire(timeout=self._holder.timeout):
            logger.warning("%s could not be released: its last heartbeat is still being written", self._path)
            return
        try:
            if self._lost is None and self._why_lost() is None:
                self._write(released=True)
        except OSError as error:
            logger.warning("%s could not be released (%s)", self._path, error)
        finally:
            self._writing.release()
            self._lost = self._lost or f"{self._path} was released"
        self._thread.join()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Try to become the owner; return False if another process was first."""
        temporary = self.directory / f".lease.{self._holder.owner}"
        try:
            write_new(temporary, self._holder.encode())
            # Neither error decides the outcome: NFS may repeat a link whose answer was lost and then find our own file
            # in place, and a new owner may have removed our temporary file. We look at the directory afterwards.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                claim(self._path, temporary, self._holder.encode())
        finally:
            temporary.unlink(missing_ok=True)
        if self._why_lost() is not None:
            if self._is_ours():
                self._path.unlink(missing_ok=True)  # a higher generation exists
            return False
        for path in self.directory.iterdir():
            found = _NAME.fullmatch(path.name)
            if path.name.startswith(".lease.") or (found and int(found[1]) < self.generation - 1):
                with contextlib.suppress(OSError):
                    path.unlink()
        return True

    def _why_lost(self) -> str | None:
        """Return why this process is not, or no longer, the owner; None while it is."""
        newest = max(_generations(self.directory), default=0)
        if newest > self.generation:
            return f"another job has taken {_path(self.directory, newest)}"
        return None if self._is_ours() else f"{self._path} was removed or replaced"

    def _is_ours(self) -> bool:
        raw = _read(self._path)
        return raw is not None and self._holder.owner.encode() in raw

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._holder.timeout / _BEATS):
            with self._writing:
                if self._ended.is_set():
                    return
                try:
                    self._lost = self._lost or self._why_lost()
                    if self._lost is not None:
                        logger.error("%s", self._lost)
                        return
                    beat += 1
                    self._write(beat=beat)
                except OSError as error:  # may be temporary; if not, another job takes over and `check` raises
                    logger.warning("the heartbeat of %s failed (%s)", self._path, error)

    def _write(self, **changes: Any) -> None:
        """Overwrite our file in place. Not by renaming, which would recreate a removed generation."""
        self._holder = dataclasses.replace(self._holder, age=int(time.monotonic() - self._acquired_at), **changes)
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, self._holder.encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _path(directory: Path, generation: int) -> Path:
    return directory / f"lease.{generation}"


def _generations(directory: Path) -> list[int]:
    # Opening a directory makes NFS ask the server whether it has changed, so this listing is current.
    return [int(found[1]) for path in directory.iterdir() if (found := _NAME.fullmatch(path.name))]


def _newest(directory: Path) -> tuple[int, bytes]:
    """Return the highest generation and its file's content; (0, b"") if there is none."""
    while True:
        generation = max(_generations(directory), default=0)
        raw = _read(_path(directory, generation)) if generation else b""
        if raw is not None:
            return generation, raw


def _read(path: Path) -> bytes | None:
    """Return the file's current content (opening it makes NFS ask the server); None if the file is gone."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def claim(name: Path, complete: Path, content: bytes) -> None:
    """Give a name to the file `complete`, or to a new one of the same content where there are no hard links.

    Raises:
        FileExistsError: somebody has the name.
    """
    try:
        os.link(complete, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # This is exclusive too, but the file is empty at first: who reads a lease then sees an unknown owner and waits.
        write_new(name, content)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet, durably, for its owner alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
