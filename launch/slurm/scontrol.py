"""What SLURM says of a job: `scontrol`, and `sacct` for what the controller has forgotten."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

#: States that a job does not leave by itself.
_ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "FORGOTTEN",
}  # fmt: skip
#: Reasons for which a pending job will wait for ever, unless someone changes the job or the cluster.
_NEVER = re.compile(
    r"Partition(Node|Time)Limit|PartitionConfig|BadConstraints|(Assoc|QOS)\w*PerJob(Limit)?|InvalidAccount|InvalidQOS"
    r"|AccountNotAllowed|QOSNotAllowed|DependencyNeverSatisfied"
)
#: Seconds in which the controller has to answer.
PATIENCE = 60.0


@dataclass(frozen=True)
class Status:
    """Where a job stands: SLURM's state and its reason, such as PENDING and Resources.

    The state is FORGOTTEN for a job that SLURM no longer knows, and UNKNOWN where nobody answers.
    """

    state: str
    reason: str = ""

    @property
    def ended(self) -> bool:
        """True once the job is over; a requeued one is not."""
        return self.state in _ENDED

    @property
    def never(self) -> bool:
        """True for a job that waits for what it cannot be given."""
        return self.state == "PENDING" and _NEVER.fullmatch(self.reason) is not None

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which job a number means: numbers begin anew on each cluster, and where a controller lost its state."""

    cluster: str
    #: The job's name.
    name: str
    #: The folder of the script that was submitted.
    folder: str


def cluster_name(timeout: float = PATIENCE) -> str:
    """The name of the cluster that answers here; empty where none does."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", ask("scontrol", "show", "config", timeout=timeout).stdout, re.M)
    return found[1] if found else ""


def status(job: str, identity: Identity | None = None, timeout: float = PATIENCE) -> Status:
    """Where the job of this number stands; FORGOTTEN where the number is another job's by now."""
    shown = ask("scontrol", "show", "job", "--oneliner", job, timeout=timeout)
    if found := re.search(r" JobState=(\w+) Reason=(\S+)", shown.stdout):
        if identity is not None and not _is(identity, shown.stdout):
            return Status("FORGOTTEN", f"{job} is another job now")
        return Status(found[1], "" if found[2] == "None" else found[2])
    if "Invalid job id" not in shown.stderr:
        return Status("UNKNOWN", _why(shown.stderr))
    if identity is not None and (here := cluster_name(timeout)) != identity.cluster:
        return Status("UNKNOWN", f"it is on the cluster {identity.cluster}, and this is {here or 'none'}")
    # The controller forgets a job minutes after its end; the accounting, where there is one, does not.
    recorded = ask("sacct", "-X", "--noheader", "--parsable2", "--format=State", "-j", job, timeout=timeout)
    words = recorded.stdout.split()
    return Status(words[0] if words else "FORGOTTEN")


def _is(identity: Identity, shown: str) -> bool:
    return f" JobName={identity.name} UserId=" in shown and f" Command={identity.folder}/" in shown


def _why(stderr: str) -> str:
    return " ".join(stderr.split())[:100] or "no answer"


def ask(*command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """What a command of SLURM answers; where it cannot be run, or not in time, that it failed."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {timeout:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
