"""Who holds a lease, as its file says, and whether that process lives.

Another host's processes can't be seen, and its clock may be wrong: what is known of a holder there is whether its file
changes. A process of this host is looked up, by more than its pid: a reused pid is another process.
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
    """What a lease file says. Its length stays the same from beat to beat, so that each overwrites it in place."""

    #: Random; no two acquisitions share it.
    owner: str
    host: str
    #: A process is known by its host's boot, its PID namespace, its pid and its start in ticks since the boot; None
    #: where the system does not tell.
    boot: str | None
    namespace: int | None
    pid: int
    started: int | None
    #: Device and inode of the leased directory, valid within one boot: they tell it from a copy.
    directory: tuple[int, int]
    slurm_job: str | None
    slurm_restart: str | None
    #: Seconds of silence after which the holder expects to be taken for dead.
    timeout: float
    #: Seconds it has held the lease, by its own count.
    age: int = 0
    #: Heartbeats so far.
    beat: int = 0
    released: bool = False

    @classmethod
    def of_this_process(cls, directory: Path, timeout: float) -> Holder:
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
        fields = dataclasses.asdict(self)
        fields["age"], fields["beat"] = f"{self.age:012}", f"{self.beat:012}"
        fields["state"] = "free" if fields.pop("released") else "held"
        return (json.dumps(fields) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Holder | None:
        """The holder that `raw` describes, or None where it is damaged."""
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

    def is_alive(self, here: Holder) -> bool | None:
        """Whether the holder's process runs, stopped or not; None where that can't be told from `here`.

        A pid means something only within one boot and PID namespace (and what NFS shows comes from elsewhere).
        """
        place = (self.host, self.boot, self.namespace)
        if None in (*place, self.started) or place != (here.host, here.boot, here.namespace):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists, and is another user's
        process = _process(self.pid)
        if process is None:
            return None  # hidden, or gone since: the next look tells
        state, started = process
        if started != self.started:
            return False  # the pid was given to another process
        if state in "ZX":
            # Killed. As long as another of its threads is on its way out, it may be finishing a write.
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
    """State letter and start time of a process, or None where `/proc` does not show it."""
    try:
        # The name, in parentheses, may hold anything; after it come state (field 3) and start time (field 22).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError):
        return None


def _threads(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0
