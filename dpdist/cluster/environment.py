"""Who am I in this job, and who coordinates it? Answered from environment variables alone.

`detect` never asks SLURM, opens no connection and imports no JAX, so it can be tested with recorded
environments. JAX's own detection is not used: it takes variables of an allocation for those of a step
(jax issue 30073) and derives its port from the job id alone, so that a requeued job meets the port of its
former self, and two steps of one job share one.
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

#: What `dpdist_launch.local` gives each process it starts.
LOCAL_VARIABLES = ("DPDIST_PROCESS_ID", "DPDIST_NUM_PROCESSES", "DPDIST_COORDINATOR")

#: What every task of an `srun` step has. A batch shell, a shell of salloc and an ssh login have only some.
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

#: From here on SLURM numbers what is no step of tasks: the shells of sbatch and of an interactive salloc.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

#: Coordinator ports lie below the range from which kernels take ports of outgoing connections (Linux starts
#: at 32768), so that no connection of the same node can already hold the port. The count is a prime.
FIRST_PORT, PORT_COUNT = 20000, 12763


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The place of one process in its job."""

    #: 0 to num_processes - 1; process 0 coordinates and owns the first device.
    process_id: int
    num_processes: int
    #: `host:port` where process 0 serves the coordination service; the same on all processes.
    coordinator_address: str
    #: GPUs of this node that belong to this process, as indices into what it can see; None takes them all.
    local_device_ids: tuple[int, ...] | None
    #: Which host of the job this process runs on; processes that share it share a shard of the data.
    host_index: int
    num_hosts: int
    #: What started the process.
    launcher: Literal["single", "local", "slurm"]

    @property
    def label(self) -> str:
        """`rank 3/80`: how the process calls itself in messages."""
        return f"rank {self.process_id}/{self.num_processes}"


def detect(environ: Mapping[str, str], *, use_gpus: bool = True) -> Membership:
    """The membership that `environ` describes: our local launcher's, a SLURM step's, or that of one process.

    Args:
        environ: environment variables, such as `os.environ`.
        use_gpus: False leaves CUDA_VISIBLE_DEVICES unread, for runs on CPU.

    Raises:
        InputError: a variable is missing from a half-set DPDIST_* group or is not a number, the node list
            cannot be read, or the process sees fewer GPUs than its node has tasks.
    """
    if any(name in environ for name in LOCAL_VARIABLES):
        return _from_local_launcher(environ, use_gpus)
    missing = [name for name in STEP_VARIABLES if not environ.get(name)]
    if not missing and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP:
        return _from_slurm_step(environ, use_gpus)
    if environ.get("SLURM_JOB_ID"):
        logger.warning(
            "inside SLURM job %s but not in a task of srun (%s): training as ONE process on this node. "
            "To use the whole job, start the program with srun.",
            environ["SLURM_JOB_ID"],
            f"{', '.join(missing)} not set" if missing else f"step {environ['SLURM_STEP_ID']} is a shell",
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
        # Processes of one machine play a cluster of one-process hosts, so that whatever depends on hosts
        # (shards, exchange of host indices) is exercised on a laptop.
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
    port = coordinator_port(
        job=_number(environ, "SLURM_JOB_ID"),
        step=_number(environ, "SLURM_STEP_ID"),
        restart=_number(environ, "SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0,
    )
    tasks_here = _tasks_on_node(environ, node)
    # --gpus-per-task=1 hides all but the task's own GPU, which is then number 0 whatever the local id is.
    # Asking for the local id, as JAX does by default, fails on every task but the first.
    sharers = 1 if _visible_gpus(environ) == 1 else tasks_here
    remedy = f"request --gpus-per-node={tasks_here} (not per task), or start fewer tasks a node."
    return Membership(
        process_id=rank,
        num_processes=size,
        coordinator_address=f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        local_device_ids=_own_gpus(environ, local_id, sharers, remedy) if use_gpus else None,
        host_index=node,
        num_hosts=nodes,
        launcher="slurm",
    )


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `n[01-20]` -> `n01`, `r1c[1-2]n[3-4]` -> `r1c1n3`.

    Raises:
        InputError: the list is empty or its brackets do not match.
    """
    # Up to the first comma outside brackets, each bracket stands for its first range's first number.
    match = re.match(r"(?:[^\[\],\s]|\[[^\[\]]+\])+(?=,|$)", node_list)
    host = re.sub(r"\[\s*([^\]\-,]+)[^\]]*\]", r"\1", match.group()) if match else ""
    if not host or "[" in host:
        raise InputError("SLURM_STEP_NODELIST", node_list, "expected hosts as SLURM writes them: n[1-9],a1.")
    return host


def coordinator_port(*, job: int, step: int, restart: int) -> int:
    """The port of the coordination service, the same on all processes without asking anyone.

    Steps of one job differ for fewer than 64 steps apart, and so do its restarts: a requeued job keeps its
    id, and its old port may still be in TIME_WAIT. Consecutive jobs land far apart.
    """
    return FIRST_PORT + (7919 * job + 64 * restart + step) % PORT_COUNT


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now, from the coordinator range.

    Asking the kernel for port 0 would give one that any outgoing connection can take before it is used.
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
    """The GPUs of the `local_id`-th task of a node, as indices into what the process can see.

    Raises:
        InputError: with `remedy`, where the tasks outnumber the GPUs that they share.
    """
    count = _visible_gpus(environ)
    if count == 0 or tasks_here == 1:
        return (0,) if count == 1 else None
    if count is None:
        # Nothing hides a GPU. Should there be any, two processes must not claim the same one.
        return (local_id,)
    if count < tasks_here:
        raise InputError(
            "CUDA_VISIBLE_DEVICES",
            environ["CUDA_VISIBLE_DEVICES"],
            f"{tasks_here} processes run on this node, one GPU each, but they see {count}; {remedy}",
        )
    return (local_id,)


def _visible_gpus(environ: Mapping[str, str]) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves; None where it is unset."""
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    # CUDA stops at the first name it does not know: -1 by custom, NoDevFiles from SLURM where there is none.
    stripped = (name.strip() for name in names.split(","))
    return len(list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), stripped)))


def _tasks_on_node(environ: Mapping[str, str], node: int) -> int:
    """Tasks on the `node`-th host of the step: `4(x2),3` is 4, 4 and 3."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    expanded = [int(tasks) for tasks, repeat in counts for _ in range(int(repeat or 1))]
    if node < len(expanded):
        return expanded[node]
    return -(-_number(environ, "SLURM_STEP_NUM_TASKS") // _number(environ, "SLURM_STEP_NUM_NODES"))


def _number(environ: Mapping[str, str], name: str) -> int:
    # Not a bare int(): it takes 2_1 for 21.
    if not re.fullmatch("[0-9]+", environ[name]):
        raise InputError(name, environ[name], "this variable must hold a whole number.")
    return int(environ[name])


def _check_below(name: str, index: int, count_name: str, count: int) -> None:
    if index >= count:
        raise InputError(name, index, f"must be below {count_name}, which is {count}.")
