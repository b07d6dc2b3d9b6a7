"""The contents of a lease file: which process holds the lease, and whether that process is alive.

We cannot see the processes of another host, and its clock may be wrong; all we can observe of a holder there is whether
its file changes. A process of this host is looked up by its pid and its start time, since pids are reused.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The record in a lease file. Its encoded length never changes, so each heartbeat overwrites the file in place."""

    #: A random id of this acquisition.
    owner: str
    host: str
    #: A process is identified by its host's boot id, its PID namespace, its pid and its start time in clock ticks since
    #: the boot; None where the system does not report one.
    boot: str | None
    namespace: int | None
    pid: int
    started: int | None
    #: Device and inode of the leased directory, to distinguish it from a copy; valid within one boot.
    directory: tuple[int, int]
    slurm_job: str | None
    slurm_restart: str | None
    #: Seconds without a heartbeat after which the holder accepts being considered dead.
    timeout: float
    #: Seconds it has held the lease, by its own clock.
    age: int = 0
    #: Heartbeats so far.
    beat: int = 0
    released: bool = False

    @classmethod
    def of_this_process(cls, directory: Path, timeout: float) -> Holder:
        """Describe this process as holder of `directory`."""
        found = directory.stat()
        process = _process(os.getpid())
        return cls(
            owner=secrets.token_hex(16),
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            started=process[1] if process else None,
            directory=(found.st_dev, found.st_ino),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            slurm_restart=os.environ.get("SLURM_RESTART_COUNT"),
            timeout=timeout,
        )

    def encode(self) -> bytes:
        """Return the lease file's content: one JSON object of fixed length."""
        fields = dataclasses.asdict(self)
        fields["age"], fields["beat"] = f"{self.age:012}", f"{self.beat:012}"
        fields["state"] = "free" if fields.pop("released") else "held"
        return (json.dumps(fields) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Holder | None:
        """Parse a lease file's content; None if it is damaged."""
        try:
            fields = json.loads(raw)
            device, inode = fields["directory"]
            holder = cls(
                owner=str(fields["owner"]),
                host=str(fields["host"]),
                boot=fields["boot"],
                namespace=fields["namespace"],
                pid=int(fields["pid"]),
                started=fields["started"],
                directory=(device, inode),
                slurm_job=fields["slurm_job"],
                slurm_restart=fields["slurm_restart"],
                timeout=float(fields["timeout"]),
                age=int(fields["age"]),
                beat=int(fields["beat"]),
                released={"free": True, "held": False}[fields["state"]],
            )
        except (ValueError, TypeError, KeyError, OverflowError):
            return None
        sane = 0 < holder.pid < 2**31 and 0 <= holder.age < 10**12 and math.isfinite(holder.timeout)
        return holder if sane else None

    def __str__(self) -> str:
        restart = f" restart {self.slurm_restart}" if self.slurm_restart else ""
        job = f"SLURM job {self.slurm_job}{restart}, " if self.slurm_job else ""
        age = datetime.timedelta(seconds=self.age)
        return f"process {self.pid} on {self.host} ({job}began {age} ago by its own count)"

    def is_start_after(self, other: Holder) -> bool:
        """Whether this process may be a later start of the SLURM job that `other` was a start of."""
        return self.slurm_job is not None and self.slurm_job == other.slurm_job

    def is_alive(self, here: Holder) -> bool | None:
        """Return whether the holder's process exists (a stopped one does); None if it cannot be known from `here`.

        A pid has a meaning only within one host, boot and PID namespace.
        """
        place = (self.host, self.boot, self.namespace)
        if None in (*place, self.started) or place != (here.host, here.boot, here.namespace):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists and belongs to another user
        process = _process(self.pid)
        if process is None:
            return None  # hidden from us, or it has just ended: the caller asks again
        state, started = process
        if started != self.started:
            return False  # the pid was given to another process
        if state in "ZX":
            # Killed. While another of its threads is still exiting, it may be finishing a write.
            return None if _threads(self.pid) > 1 else False
        return True if self.directory == here.directory else None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> int | None:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None


def _process(pid: int) -> tuple[str, int] | None:
    """Return a process's state letter and start time in ticks; None if `/proc` does not show it."""
    try:
        # The name, in parentheses, may contain any character; after it come state (field 3) and start time (field 22).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError):
        return None


def _threads(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0
