"""The lease on a run directory: two live jobs on one run would sample and draw the same keys for other parameters.

A directory holds files `lease.N`; whoever made the one with the highest N, its generation, owns the run. To take over
is to make `lease.N+1`. No lock of the file system is held, so none outlives a dead node, and no clock is compared with
that of another host. Why no two own at once:

* *Two contenders for N+1*: a file comes to its name whole and only where nothing has it (`link`), so one wins.
* *A contender that slept since it read N*, while N+1 came and went: it makes an N+1 again, then looks, finds a higher
  one, and withdraws. A file is removed only by someone who has seen a higher one, so the highest never falls. To be
  misled, it would have to miss two more takeovers during its one reading of a small directory: owners keep the file
  before theirs.
* *A thief and a thawing owner*: a lease is taken from an owner that may live only after it was silent for `timeout`
  seconds on the thief's own clock. Should it wake, its `check` finds the higher generation; its heartbeats go to its
  own file alone. It owned until the thief's link and not after.

Not guaranteed: an owner that freezes between `check` and the write that follows, or has a write under way when it is
killed, still writes that one thing, and what it writes must bear that. A checkpoint does: the thief's replay computes
it from the same samples and noise. A ledger line that is appended does: it can only charge more; one that first
truncates the file would not. Machines that are live clones of one snapshot, host name and boot id included, are taken
for one machine.
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
#: A heartbeat every so-many-th part of the timeout: several may come late before anyone calls the owner dead.
_BEATS = 6
#: Seconds for which a process of this host may still be there after it was killed; then it counts as alive.
_DYING = 0.5
#: What `link` raises on file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
#: A file removed by another host while it is read over NFS is reported as stale, not as missing.
_GONE = (errno.ENOENT, errno.ESTALE)


class LeaseLostError(RuntimeError):
    """This process no longer owns the run directory, and must write nothing more into it."""


class Lease:
    """Ownership of a run directory, held by process 0 of a job. Made by `acquire`; a context manager.

    A daemon thread proves every `timeout / 6` seconds that the owner lives; `timeout` must exceed the longest time for
    which code in C may hold the GIL.
    """

    def __init__(self, directory: Path, generation: int, holder: Holder) -> None:
        self.directory, self.generation = directory, generation
        #: Whose lease was taken over after a death, and how that was told; None where nothing was held.
        self.taken_from: str | None = None
        self._path = _path(directory, generation)
        self._holder = holder
        self._began = time.monotonic()
        self._lost: str | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def acquire(cls, directory: str | Path, timeout: float) -> Lease:
        """Take the lease on `directory`, waiting only where its holder may be dead on another host.

        Args:
            directory: where the lease files lie; it exists, and all hosts that may contend share it.
            timeout: seconds of silence after which a holder elsewhere counts as dead. A holder that announced a longer
                timeout of its own is given that.

        Raises:
            InputError: a live process holds it, or the directory cannot be used.
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
        since = 0.0
        while True:
            # The time is taken before the reading it is for: a thief that is frozen in between must not take its own
            # silence for the owner's.
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
        """Make sure that this process still owns the directory; call it before whatever another job must not see.

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

    def release(self) -> None:
        """Let the next job start at once. Repeated calls, and one after a loss, do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        # A heartbeat that hangs in a dead file system must not hang this too; the next job then waits its timeout.
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
        """Try to become the owner; False where another was first."""
        temporary = self.directory / f".lease.{self._holder.owner}"
        try:
            _write_new(temporary, self._holder.encode())
            # Neither error tells enough. A link that NFS repeats since its answer was lost finds its own file there,
            # and a temporary file that is gone was swept up by a new owner. What is there afterwards counts.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                try:
                    os.link(temporary, self._path)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    # Exclusive too, but empty at first: who reads it then sees an unknown owner, and watches.
                    _write_new(self._path, self._holder.encode())
        finally:
            temporary.unlink(missing_ok=True)
        if self._why_lost() is not None:
            if self._is_ours():
                self._path.unlink(missing_ok=True)  # a higher one exists
            return False
        for path in self.directory.iterdir():
            found = _NAME.fullmatch(path.name)
            if path.name.startswith(".lease.") or (found and int(found[1]) < self.generation - 1):
                with contextlib.suppress(OSError):
                    path.unlink()
        return True

    def _why_lost(self) -> str | None:
        """Why this is not, or no longer, the lease that counts; None while it is."""
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
                except OSError as error:  # it may pass; if it does not, others take over and `check` tells
                    logger.warning("the heartbeat of %s failed (%s)", self._path, error)

    def _write(self, **changes: Any) -> None:
        """Overwrite our file in place. Never by renaming: that would bring a removed generation back."""
        self._holder = dataclasses.replace(self._holder, age=int(time.monotonic() - self._began), **changes)
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, self._holder.encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _path(directory: Path, generation: int) -> Path:
    return directory / f"lease.{generation}"


def _generations(directory: Path) -> list[int]:
    # NFS asks the server whether a directory has changed each time it is opened, as this does.
    return [int(found[1]) for path in directory.iterdir() if (found := _NAME.fullmatch(path.name))]


def _newest(directory: Path) -> tuple[int, bytes]:
    """The highest generation and its content; (0, b"") where there is none."""
    while True:
        generation = max(_generations(directory), default=0)
        raw = _read(_path(directory, generation)) if generation else b""
        if raw is not None:
            return generation, raw


def _read(path: Path) -> bytes | None:
    """The content as it is now (opening a file makes NFS ask the server), or None where the file is gone."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
