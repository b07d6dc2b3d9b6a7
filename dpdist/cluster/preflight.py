"""Check the machines of a job before its first step: what would fail or delay all later is named by its node now.

`require_shared` tests the run directory, `require_network` the all-reduce of a step, with the step's own program on
numbers whose sum is known. Both are collective and bounded, and take a second or so where all is well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpdist.cluster.agreement import all_gather, decide
from dpdist.cluster.lease import claim, write_new
from dpdist.cluster.world import AXIS, World
from dpdist.errors import InputError
from dpdist.mechanism.step import StepPrograms

#: Seconds in which what one process has written must be seen by all others; NFS may keep an old listing for some.
PATIENCE = 30.0
#: Seconds by which clocks may differ. Nothing rests on them but what people read in logs.
CLOCKS = 60.0
#: Seconds for all-reduces; after the first, as many more as fit, up to three.
_MEASURING, _CALLS = 5.0, 3
#: Numbers a device sends to another one where the slow node is looked for: 8 MB.
_PROBE = 2**20
#: A node is slow if its connection has less than this share of the median's bandwidth.
_SLOW = 0.5
_CONTENT = b"preflight\n"


class BadNodeError(RuntimeError):
    """A node is not fit for the job, which may go on without it; the message begins with the node's name."""

    def __init__(self, node: str, fault: str) -> None:
        super().__init__(f"bad node {node}: {fault}")


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """What one all-reduce of a step's sums takes on this job."""

    #: Of the vector on each device.
    bytes: int
    #: The slowest process's median.
    seconds: float
    devices: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second that each device must send: 2 (n - 1) / n of its vector, whatever the algorithm."""
        return 2 * (self.devices - 1) / self.devices * self.bytes / self.seconds


def require_shared(directory: Path, world: World, *, patience: float = PATIENCE) -> list[str]:
    """Make sure that all processes share a directory, and that of all who claim a name there, one gets it. Collective.

    Args:
        directory: that of the run; a folder is made in it and removed again.
        patience: seconds for each process to see what another has written.

    Returns:
        Warnings: of clocks that differ.

    Raises:
        InputError: on all processes: one cannot write there, does not see the others' files, or several got one name.
    """
    if world.num_processes == 1:
        return []
    begun = decide(world, lambda: _begin(directory))
    folder = directory / begun["folder"]
    found = {"clock": time.time() - begun["clock"]} | _take_part(folder, world.process_id, patience)
    try:
        reports = all_gather(found, world, timeout=patience + world.timeout)
        decide(world, lambda: _judge(folder, reports, world, patience), timeout=patience + world.timeout)
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return [
        f"the clock of {_named(world, rank)} differs from that of {_named(world, 0)} by {report['clock']:+.0f} s"
        for rank, report in enumerate(reports)
        if abs(report["clock"]) > CLOCKS
    ]


def _begin(directory: Path) -> dict[str, Any]:
    folder = directory / f"preflight-{os.urandom(6).hex()}"
    try:
        folder.mkdir(mode=0o700)
        _write(folder / "begun")
    except OSError as error:
        raise InputError("run.dir", str(directory), f"cannot be written ({error.strerror}); name another.") from None
    return {"folder": folder.name, "clock": time.time()}


def _take_part(folder: Path, rank: int, patience: float) -> dict[str, Any]:
    """What one process finds in the folder, once it has left its own file and tried to get the name `first`."""
    if not _appears(folder / "begun", patience):
        return {"sees": False, "error": None, "won": False}
    try:
        own = folder / f"rank-{rank}"
        _write(own)
        return {"sees": True, "error": None, "won": _claims(own, folder / "first")}
    except OSError as error:
        return {"sees": True, "error": error.strerror, "won": False}


def _claims(own: Path, name: Path) -> bool:
    """Try to get the name as a lease does."""
    try:
        claim(name, own, _CONTENT)
    except FileExistsError:
        return False
    return True


def _judge(folder: Path, reports: Sequence[dict[str, Any]], world: World, patience: float) -> None:
    where, deadline = str(folder.parent), time.monotonic() + patience
    for rank, report in enumerate(reports):
        who = _named(world, rank)
        if not report["sees"]:
            raise InputError(
                "run.dir",
                where,
                f"{who} does not see what {_named(world, 0)} writes there; name a directory on a file system that all "
                "nodes share, and see that it is mounted on that node.",
            )
        if report["error"] is not None:
            raise InputError("run.dir", where, f"{who} cannot write there ({report['error']}); mend that node.")
        if not _appears(folder / f"rank-{rank}", deadline - time.monotonic()):
            raise InputError(
                "run.dir",
                where,
                f"what {who} writes there is not seen by {_named(world, 0)}; name a directory on a shared file system.",
            )
    winners = [_named(world, rank) for rank, report in enumerate(reports) if report["won"]]
    if len(winners) != 1:
        raise InputError(
            "run.dir",
            where,
            f"{' and '.join(winners) or 'nobody'} got one name that all asked for: this file system does not keep two "
            "jobs from training one run; name a directory on another.",
        )


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):  # the directory may not be there at all, or be out of date
            list(path.parent.parent.iterdir())  # makes NFS ask the server
            if path.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _write(path: Path) -> None:
    write_new(path, _CONTENT)


def require_network(
    programs: StepPrograms, world: World, *, noisy: bool, least_bandwidth: float | None
) -> AllReduce | None:
    """Run and time the all-reduce of a step with numbers whose sum is known. Collective; None with a single device.

    Args:
        noisy: whether the program also takes the noise.
        least_bandwidth: bytes a second that `AllReduce.bandwidth` must reach; None asks for nothing.

    Raises:
        BadNodeError: on all processes: a node's sum is wrong, or its connection is what is slow.
        InputError: on all processes: the bandwidth is below the least, and no single node is the cause.
    """
    if world.device_count == 1:
        return None
    sums = programs.zero_sums()
    numbers = range(1, world.device_count + 1)
    expected = sum(numbers)
    program = programs.compiled()["reduce"]

    def reduce() -> float:
        whole = [_spread(programs, numbers, sums.shape[0] // world.device_count, sums.dtype)]
        if noisy:
            whole.append(_spread(programs, [0] * world.device_count, programs.parameters, sums.dtype))
        jax.block_until_ready(whole)
        began = time.perf_counter()
        total, _ = jax.block_until_ready(program(*whole))
        seconds = time.perf_counter() - began
        exact.append(all(bool(np.all(np.asarray(shard.data) == expected)) for shard in total.addressable_shards))
        return seconds

    exact: list[bool] = []
    first = reduce()  # connects, too
    seconds = statistics.median([reduce() for _ in range(_CALLS)] if _slowest(first, world) < _MEASURING else [first])
    wrong = [rank for rank, right in enumerate(all_gather(all(exact), world)) if not right]
    if len(wrong) == 1 and world.num_processes > 1:
        raise BadNodeError(world.nodes[wrong[0]], f"{_named(world, wrong[0])} got a wrong sum from an all-reduce")
    if wrong:
        raise InputError(
            "cluster",
            [_named(world, rank) for rank in wrong],
            "got a wrong sum of known numbers from an all-reduce: memory or network of a node changes numbers, and "
            "which node cannot be told; run on other nodes.",
        )
    found = AllReduce(
        bytes=sums.nbytes // world.device_count, seconds=_slowest(seconds, world), devices=world.device_count
    )
    if least_bandwidth is not None and found.bandwidth < least_bandwidth:
        _blame(found, world, least_bandwidth)
    return found


def _spread(programs: StepPrograms, numbers: Sequence[int], size: int, dtype: Any) -> Any:
    with jax.enable_x64(True):
        slices = {i: jax.device_put(np.full(size, numbers[i], dtype), to) for i, to in programs.local.items()}
        return programs.whole(slices, programs.sharded)


def _slowest(seconds: float, world: World) -> float:
    return max(all_gather(seconds, world))


def _blame(found: AllReduce, world: World, least: float) -> None:
    """Raise the error about a slow all-reduce, with the node whose connection to the first one is the slow one."""
    fault = f"the all-reduce reaches {found.bandwidth / 1e9:.3g} GB/s a device, less than {least / 1e9:g}"
    firsts = {world.nodes[device.process_index]: device for device in reversed(world.mesh.devices)}
    first = world.nodes[0]
    seconds = {node: _pair(firsts[first], device, world) for node, device in firsts.items() if node != first}
    if len(seconds) > 1:
        median = statistics.median(seconds.values())
        slowest = max(seconds, key=lambda node: seconds[node])
        if seconds[slowest] * _SLOW > median:
            raise BadNodeError(
                slowest, f"{fault}; its connection to {first} takes {seconds[slowest] / median:.1f} times the median's"
            )
    raise InputError(
        "cluster.least_bandwidth",
        least / 1e9,
        f"{fault}, and no single node is the cause; check the network (NCCL_SOCKET_IFNAME, NCCL_DEBUG=WARN), "
        "or give a smaller one.",
    )


def _pair(one: jax.Device, other: jax.Device, world: World) -> float:
    """Seconds of an all-reduce between two devices; all processes call it, those of the two devices take part."""
    mesh, local = Mesh(np.array([one, other]), (AXIS,)), [d for d in (one, other) if d in world.mesh.local_devices]
    seconds = 0.0
    if local:
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        zeros = [jax.device_put(np.zeros(_PROBE, np.float32), device) for device in local]
        array = jax.make_array_from_single_device_arrays((2 * _PROBE,), sharding, zeros)
        reduce: Callable[..., Any] = jax.shard_map(
            lambda x: lax.psum(x, AXIS), mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec()
        )
        program = jax.jit(reduce).lower(array).compile()
        jax.block_until_ready(program(array))
        began = time.perf_counter()
        jax.block_until_ready(program(array))
        seconds = time.perf_counter() - began
    return _slowest(seconds, world)


def _named(world: World, rank: int) -> str:
    return f"rank {rank} ({world.nodes[rank]})"
