"""Find this process's rank and the job's coordinator from environment variables alone.

`detect` never asks SLURM, opens no connection and imports no JAX, so it can be tested with recorded environments. We do
not use JAX's own detection: it mistakes an allocation's variables for a step's (jax issue 30073), and it derives the
port from the job id alone, so a requeued job may find its old port still in use, and two steps of one job share a port.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dpdist.errors import InputError

logger = logging.getLogger(__name__)

#: Set by `dpdist_launch.local` for each process it starts.
LOCAL_VARIABLES = ("DPDIST_PROCESS_ID", "DPDIST_NUM_PROCESSES", "DPDIST_COORDINATOR")

#: Set for every task of an `srun` step. A batch shell, a shell of salloc and an ssh login have only some of them.
STEP_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)

#: SLURM gives step ids from here on to shells (of sbatch, of an interactive salloc), which are not steps of tasks.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

#: Coordinator ports lie below the range from which kernels choose ports for outgoing connections (on Linux from 32768
#: on), so no outgoing connection of the node can hold the port. The count is a prime.
FIRST_PORT, PORT_COUNT = 20000, 12763


@dataclass(frozen=True, kw_only=True)
class Membership:
    """One process's rank, host and GPUs in its job, and the job's coordinator."""

    #: 0 to num_processes - 1; process 0 coordinates and owns the first device.
    process_id: int
    num_processes: int
    #: `host:port` where process 0 serves the coordination service; the same on all processes.
    coordinator_address: str
    #: GPUs that belong to this process, as indices into those it can see; None means all of them.
    local_device_ids: tuple[int, ...] | None
    #: Index of this process's host within the job; processes of one host share a data shard.
    host_index: int
    num_hosts: int
    #: What started the process.
    launcher: Literal["single", "local", "slurm"]

    @property
    def label(self) -> str:
        """The process's name in messages: `rank 3/80`."""
        return f"rank {self.process_id}/{self.num_processes}"


def detect(environ: Mapping[str, str], *, use_gpus: bool = True, step: str | None = None) -> Membership:
    """Return this process's membership: in a job of our local launcher, in a SLURM step, or as a single process.

    Args:
        environ: environment variables, such as `os.environ`.
        use_gpus: False ignores CUDA_VISIBLE_DEVICES, for runs on CPU.
        step: which step this process is part of as `step_of_process` tells, whatever the variables say; None is not
            known.

    Raises:
        InputError: only some of the DPDIST_* variables are set, a variable is not a number, the node list cannot be
            parsed, rank 0 may be on any of its nodes, or the process sees fewer GPUs than its node has tasks.
    """
    if any(name in environ for name in LOCAL_VARIABLES):
        return _from_local_launcher(environ, use_gpus)
    missing = [name for name in STEP_VARIABLES if not environ.get(name)]
    if environ.get("SLURM_JOB_ID"):
        if missing:
            why = f"{', '.join(missing)} not set"
        elif _number(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
            why = f"step {environ['SLURM_STEP_ID']} is a shell"
        elif step not in (None, named := f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}") and not any(
            name.startswith("SLURM_HET_")
            for name in environ  # whose components have numbers of their own
        ):
            why = f"the SLURM_* variables are left over from step {named}, and this process is in {step}"
        else:
            return _from_slurm_step(environ, use_gpus)
        logger.warning(
            "inside SLURM job %s but not in a task of srun (%s): training as ONE process on this node. "
            "To use the whole job, start the program with srun.",
            environ["SLURM_JOB_ID"],
            why,
        )
    return Membership(
        process_id=0,
        num_processes=1,
        coordinator_address=f"127.0.0.1:{free_port()}",
        local_device_ids=None,
        host_index=0,
        num_hosts=1,
        launcher="single",
    )


def _from_local_launcher(environ: Mapping[str, str], use_gpus: bool) -> Membership:
    for name in LOCAL_VARIABLES:
        if not environ.get(name):
            raise InputError(name, environ.get(name), f"set all of {', '.join(LOCAL_VARIABLES)}, or none.")
    rank, size = (_number(environ, name) for name in LOCAL_VARIABLES[:2])
    _check_below("DPDIST_PROCESS_ID", rank, "DPDIST_NUM_PROCESSES", size)
    coordinator = environ["DPDIST_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError("DPDIST_COORDINATOR", coordinator, "write host:port, such as 127.0.0.1:20000.")
    remedy = "start fewer processes, or set cluster.platform=cpu."
    return Membership(
        process_id=rank,
        num_processes=size,
        coordinator_address=coordinator,
        local_device_ids=_own_gpus(environ, rank, size, remedy) if use_gpus else None,
        # Each local process counts as a host of its own, so that all code that depends on hosts (shards, exchange of
        # host indices) also runs on a laptop.
        host_index=rank,
        num_hosts=size,
        launcher="local",
    )


def _from_slurm_step(environ: Mapping[str, str], use_gpus: bool) -> Membership:
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    _check_below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", size)
    node, nodes = _number(environ, "SLURM_NODEID"), _number(environ, "SLURM_STEP_NUM_NODES")
    _check_below("SLURM_NODEID", node, "SLURM_STEP_NUM_NODES", nodes)
    local_id = _number(environ, "SLURM_LOCALID")
    distribution = environ.get("SLURM_DISTRIBUTION", "")
    if size > 1 and distribution.startswith("arbitrary"):
        remedy = "no variable of SLURM's says on which node rank 0 is; give srun --distribution=block, cyclic or plane."
        raise InputError("SLURM_DISTRIBUTION", distribution, remedy)
    port = coordinator_port(
        job=_number(environ, "SLURM_JOB_ID"),
        step=_number(environ, "SLURM_STEP_ID"),
        restart=_number(environ, "SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0,
    )
    # One task has nobody to meet, and may be a shell in which several programs run, one after the other or at once.
    address = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}" if size > 1 else f"127.0.0.1:{free_port()}"
    tasks_here = _tasks_on_node(environ, node)
    # --gpus-per-task=1 hides all but the task's own GPU, which then has index 0 in every task. Using the local id as
    # index, as JAX does by default, fails on every task but the first.
    sharers = 1 if _visible_gpus(environ) == 1 else tasks_here
    remedy = f"request --gpus-per-node={tasks_here} (not per task), or start fewer tasks a node."
    return Membership(
        process_id=rank,
        num_processes=size,
        coordinator_address=address,
        local_device_ids=_own_gpus(environ, local_id, sharers, remedy) if use_gpus else None,
        host_index=node,
        num_hosts=nodes,
        launcher="slurm",
    )


def node_name(environ: Mapping[str, str]) -> str:
    """Return the name of this process's node: SLURM's, since virtual nodes may share a host name, or the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: `n[01-20]` -> `n01`, `r1c[1-2]n[3-4]` -> `r1c1n3`.

    Raises:
        InputError: the list is empty or its brackets do not match.
    """
    # Take the text up to the first comma outside brackets, and replace each bracket by its first number.
    match = re.match(r"(?:[^\[\],\s]|\[[^\[\]]+\])+(?=,|$)", node_list)
    host = re.sub(r"\[\s*([^\]\-,]+)[^\]]*\]", r"\1", match.group()) if match else ""
    if not host or "[" in host:
        raise InputError("SLURM_STEP_NODELIST", node_list, "expected hosts as SLURM writes them: n[1-9],a1.")
    return host


def coordinator_port(*, job: int, step: int, restart: int) -> int:
    """Return the coordination service's port, computed alike on all processes without communication.

    Steps fewer than 64 apart within one job get different ports, and so do its restarts: a requeued job keeps its id,
    and its old port may still be in TIME_WAIT. Consecutive job ids get ports far apart.
    """
    return FIRST_PORT + (7919 * job + 64 * restart + step) % PORT_COUNT


def free_port() -> int:
    """Return a port of the coordinator range that is free on the loopback interface now.

    We do not ask the kernel for one (port 0): any outgoing connection could take that port before we use it.
    """
    candidates = random.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + PORT_COUNT), 64)
    for port in candidates:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 64 random ports from {FIRST_PORT} on could be bound on 127.0.0.1")


def _own_gpus(environ: Mapping[str, str], local_id: int, tasks_here: int, remedy: str) -> tuple[int, ...] | None:
    """Return the GPUs of a node's task number `local_id`, as indices into those the process can see; None means all.

    Raises:
        InputError: with `remedy`, if there are more tasks than GPUs to share.
    """
    count = _visible_gpus(environ)
    if count == 0 or tasks_here == 1:
        return (0,) if count == 1 else None
    if count is None:
        # All GPUs of the node, if it has any, are visible, and two processes must not claim the same one.
        return (local_id,)
    if count < tasks_here:
        raise InputError(
            "CUDA_VISIBLE_DEVICES",
            environ["CUDA_VISIBLE_DEVICES"],
            f"{tasks_here} processes run on this node, one GPU each, but they see {count}; {remedy}",
        )
    return (local_id,)


def _visible_gpus(environ: Mapping[str, str]) -> int | None:
    """Count the GPUs listed in CUDA_VISIBLE_DEVICES; None if it is unset."""
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    # CUDA ignores the list from the first invalid name on: conventionally -1; SLURM writes NoDevFiles for no GPU.
    stripped = (name.strip() for name in names.split(","))
    return len(list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), stripped)))


def _tasks_on_node(environ: Mapping[str, str], node: int) -> int:
    """Return the number of tasks on host number `node` of the step; SLURM writes 4, 4 and 3 as `4(x2),3`."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    expanded = [int(tasks) for tasks, repeat in counts for _ in range(int(repeat or 1))]
    if node < len(expanded):
        return expanded[node]
    return -(-_number(environ, "SLURM_STEP_NUM_TASKS") // _number(environ, "SLURM_STEP_NUM_NODES"))


def _number(environ: Mapping[str, str], name: str) -> int:
    # int() alone would read 2_1 as 21.
    if not re.fullmatch("[0-9]+", environ[name]):
        raise InputError(name, environ[name], "this variable must hold a whole number.")
    return int(environ[name])


def _check_below(name: str, index: int, count_name: str, count: int) -> None:
    if index >= count:
        raise InputError(name, index, f"must be below {count_name}, which is {count}.")
