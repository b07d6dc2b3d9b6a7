"""Check before the first step that disk and memory hold what the run certainly needs, and name the node where not.

What is asked for is the least that can do: a run that passes may still need more, and one that fails would have died at
its first save, or under the kernel's out-of-memory killer, hours after it was queued.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpdist.cluster.agreement import all_gather, decide
from dpdist.cluster.preflight import BadNodeError
from dpdist.cluster.world import World
from dpdist.errors import InputError


def require_disk(directory: Path, world: World, *, checkpoint: int, more: int) -> list[str]:
    """Make sure that a checkpoint fits where the run is. Collective.

    Args:
        checkpoint: bytes of one.
        more: how many more than there are will lie there at once.

    Returns:
        Warnings, on process 0: one fits, and not all that will be kept.

    Raises:
        InputError: on all processes: not even one fits.
    """

    def look() -> list[str]:
        found = os.statvfs(directory)
        free = found.f_bavail * found.f_frsize
        if free < checkpoint:
            remedy = f"has {_size(free)} free, and a checkpoint takes {_size(checkpoint)}: make room, or name another."
            raise InputError("run.dir", str(directory), remedy)
        if free >= more * checkpoint:
            return []
        return [
            f"{directory} has {_size(free)} free, and {more} more checkpoints of {_size(checkpoint)} will lie there "
            "(checkpoint.keep)"
        ]

    return decide(world, look)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What processes may still take of a node's memory."""

    left: float
    #: What says so: `the node` or, with a limit such as that of `sbatch --mem`, `the job`.
    whose: str


def require_memory(world: World, *, each: int, found: Memory | None = None) -> None:
    """Make sure that each node's memory holds what its processes need at least. Collective.

    Args:
        each: bytes that every process needs at least, beyond what it has taken.
        found: what this process may take; None looks.

    Raises:
        BadNodeError: on all processes: one node has too little, and others have enough.
        InputError: on all processes: all have too little.
    """
    own = memory_left() if found is None else found
    told = all_gather((own.left, own.whose), world)
    left: dict[str, tuple[float, str]] = {}
    for node, (size, whose) in zip(world.nodes, told, strict=True):
        left[node] = min((size, whose), left.get(node, (size, whose)))
    faults = {}
    for node, (size, whose) in left.items():
        processes = world.nodes.count(node)
        if size < processes * each:
            needed = f"{processes} process(es) there need at least {_size(processes * each)}"
            faults[node] = f"{whose} has {_size(size)} of memory left, and {needed}"
    if not faults:
        return
    node, fault = next(iter(faults.items()))
    if len(faults) < len(left):
        raise BadNodeError(node, fault)
    remedy = "ask for more memory (sbatch --mem), for fewer processes a node, or train a smaller model."
    raise InputError("cluster", node, f"{fault}; {remedy}")


def memory_left(root: Path = Path("/")) -> Memory:
    """What this process and its siblings may still take: of the node, or of a control group with a limit.

    A group's page cache counts as free where it is old (`inactive_file`), as for the kernel. Infinite where the system
    does not tell.

    Args:
        root: where /proc and /sys are.
    """
    node = Memory(left=_available(root), whose="the node")
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return node
    found = [node]
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            found += _groups(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _groups(root / "sys/fs/cgroup/memory", path, *files)
    return min(found, key=lambda memory: memory.left)


def _available(root: Path) -> float:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return float("inf")


def _groups(top: Path, path: str, limit: str, usage: str, cache: str) -> list[Memory]:
    """The group at `path` and those above it, as far as they have a limit."""
    found, group = [], top / path.lstrip("/")
    for each in (group, *group.parents):
        if not each.is_relative_to(top):
            break
        try:
            most = float((each / limit).read_text())  # "max" is no number
            used = float((each / usage).read_text())
            fields = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
            found.append(Memory(left=most - used + float(fields.get(cache, 0)), whose="the job"))
        except (OSError, ValueError):
            continue
    return found


def _size(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
