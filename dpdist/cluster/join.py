"""Joining and leaving a job.

Joining is the one place that touches JAX's global state: platform, virtual CPU devices, compilation cache,
`jax.distributed`. No SIGTERM handler is installed here or anywhere else in dpdist: JAX's preemption service
owns that signal, and a handler set later would silently disable
`multihost_utils.reached_preemption_sync_point`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # There is no public way to ask without initialising the backend.

from dpdist import config
from dpdist.cluster import agreement
from dpdist.cluster.core_files import forbid_core_files
from dpdist.cluster.environment import Membership, detect, node_name
from dpdist.cluster.node_list import node_of_rank
from dpdist.cluster.preemption import listen
from dpdist.cluster.rendezvous import meet
from dpdist.cluster.step_daemon import step_of_process
from dpdist.cluster.streams import open_missing_streams
from dpdist.cluster.world import AXIS, World
from dpdist.errors import InputError

logger = logging.getLogger(__name__)

#: Settings of JAX that decide samples, noise or dtypes for given keys, and the one value that each has in a run.
PINNED = {
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
}
#: Threads of XLA's pool on CPU. Long sums are cut into as many parts, so one number for all jobs gives one result. More
#: threads than cores cost one process nothing that could be measured; five of two devices each on 2 cores took a sixth
#: longer, beside other work.
POOL_THREADS = 16
#: Seconds by which process 0 outlives a failure, so that each process can name its own reason.
_LAST_TO_LEAVE = 2.0


def join(cluster: config.Cluster, membership: Membership | None = None) -> World:
    """Become a process of the job, wait for all the others, and check that the devices are those asked for.

    `jax.distributed` is initialised for one process too: without it the preemption sync point never fires.
    If it already is (a second call in one Python), it is reused. `PINNED` is set, whatever it was before, and stays.

    Args:
        membership: who this process is; None asks `detect(os.environ)`.

    Raises:
        InputError: the environment is inconsistent; rank 0's host cannot be found, or its port is taken; or
            platform or number of devices is not what `cluster` asks for, here or on any other process, and then all
            processes raise it.
        TimeoutError: a process joined but did not answer within `cluster.shutdown_timeout`.
        MissingRanksError: not all processes came within `cluster.initialization_timeout`; the text names those.
    """
    open_missing_streams()
    _pin()
    forbid_core_files()
    if membership is None:
        membership = detect(os.environ, use_gpus=cluster.platform != "cpu", step=step_of_process())
    distributed = True
    if jax.distributed.is_initialized():
        membership = _as_initialized(membership)
    elif xla_bridge.backends_are_initialized():
        _require_alone(membership)
        distributed = False
    else:
        _configure(cluster, membership)
        _initialize(cluster, membership)

    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    world = World(
        membership=membership,
        mesh=jax.sharding.Mesh(np.array(devices), (AXIS,)),
        host_of_device=(),
        nodes=(),
        timeout=cluster.shutdown_timeout,
        distributed=distributed,
    )
    reports = agreement.all_gather(
        {
            "platform": jax.default_backend(),
            "devices": jax.local_device_count(),
            "host": membership.host_index,
            "node": node_name(os.environ),
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS"),
        },
        world,
    )
    _check_platforms(cluster, reports)
    _check_device_counts(cluster, reports)
    hosts = tuple(reports[device.process_index]["host"] for device in devices)
    return dataclasses.replace(world, host_of_device=hosts, nodes=tuple(report["node"] for report in reports))


def leave() -> None:
    """Leave in good order: wait (bounded by `cluster.shutdown_timeout`) for the others, then disconnect.

    For the end of a program. JAX can't join twice in one Python, so a library call must not leave.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def abort(code: int) -> NoReturn:
    """End this process now, with `code`, leaving everything to the launcher that ends the others.

    An ordinary exit runs JAX's shutdown barrier, in which this process would wait for others that wait for
    it in a collective. The barrier then fails, JAX ends the process with SIGABRT, and the launcher sees 134
    and a shutdown error in place of the cause.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ours = distributed.global_state  # not jax.process_index(), which raises where the backend could not be made
    if jax.distributed.is_initialized() and (ours.num_processes or 1) > 1 and ours.process_id == 0:
        # Process 0 serves what the others may still be reading, such as the error that ends them all.
        time.sleep(_LAST_TO_LEAVE)
    os._exit(code)


def _pin() -> None:
    """Set `PINNED`, and say what was otherwise."""
    for name, value in PINNED.items():
        found = getattr(jax.config, name)
        if getattr(found, "value", found) != value:  # some are enums
            logger.warning("%s is %r in this environment; training sets it to %r", name, found, value)
            jax.config.update(name, value)


def _configure(cluster: config.Cluster, membership: Membership) -> None:
    """Set what JAX reads when it makes its backend."""
    if cluster.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    # XLA makes its pool of so many threads, whatever the cores, and of more for more devices. What is set stays.
    os.environ.setdefault("NPROC", str(POOL_THREADS))
    # JAX's default is Gloo. It listens by this host's name, which need not resolve on a laptop, and prints its
    # connections on stdout, where commands print JSON; one process has no use for it.
    jax.config.update("jax_cpu_collectives_implementation", None if membership.num_processes == 1 else "gloo")
    if cluster.platform != "gpu" and cluster.devices_per_process is not None:
        jax.config.update("jax_num_cpu_devices", cluster.devices_per_process)


def _initialize(cluster: config.Cluster, membership: Membership) -> None:
    host, _, port = membership.coordinator_address.rpartition(":")
    if membership.num_processes > 1:
        _require_resolvable(host, "rank 0's host", membership)
        if cluster.platform == "cpu":
            _require_resolvable(socket.gethostname(), "this host itself, by which Gloo listens", membership)
    if membership.process_id == 0:
        _require_free(host, int(port), membership)
    node_of = node_of_rank(os.environ) if membership.launcher == "slurm" else lambda rank: None
    start = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    meet(membership, node_of, cluster.initialization_timeout, ".".join(start))
    jax.distributed.initialize(
        coordinator_address=membership.coordinator_address,
        num_processes=membership.num_processes,
        process_id=membership.process_id,
        local_device_ids=membership.local_device_ids,
        # None for the device ids would make JAX look for SLURM again and mix its findings with ours.
        cluster_detection_method="deactivate",
        # The service is unauthenticated: a job of one machine must not offer it to the network.
        coordinator_bind_address=f"{host}:{port}" if host == "127.0.0.1" else None,
        initialization_timeout=cluster.initialization_timeout,
        heartbeat_timeout_seconds=cluster.heartbeat_timeout,
        shutdown_timeout_seconds=cluster.shutdown_timeout,
    )
    if membership.launcher == "slurm":
        listen()


def _require_resolvable(host: str, whose: str, membership: Membership) -> None:
    """Fail now where a host has no address: JAX would try until `initialization_timeout`, or give no reason.

    Raises:
        InputError: the name service says no, or gives no answer in three attempts.
    """
    for attempt in range(1, 4):
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN and attempt < 3:
                time.sleep(attempt)
                continue
            raise InputError(
                "coordinator",
                membership.coordinator_address,
                f"{membership.label} on {socket.gethostname()} cannot find {host}, {whose} ({error.strerror}); "
                "put the names of the nodes into the name service or /etc/hosts of every node.",
            ) from None


def _require_free(host: str, port: int, membership: Membership) -> None:
    """Fail where somebody listens on the coordinator's port: the service would crash, or, where that somebody is
    another such service, share its port and its callers.

    Raises:
        InputError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what only lingers from a former job is no harm
        try:
            probe.bind((host if host == "127.0.0.1" else "", port))
        except OSError as error:
            raise InputError(
                "coordinator",
                membership.coordinator_address,
                f"{membership.label} cannot listen there ({error.strerror}), so another program has the port; start "
                "the job again: every job, step and restart gets a port of its own.",
            ) from None


def _as_initialized(membership: Membership) -> Membership:
    """`membership`, corrected to what `jax.distributed` was initialised with."""
    rank, size = jax.process_index(), jax.process_count()
    if (membership.process_id, membership.num_processes) == (rank, size):
        return membership
    # Somebody else (MPI, a cloud pod) started the processes: hosts are unknown, one each is always right.
    return dataclasses.replace(membership, process_id=rank, num_processes=size, host_index=rank, num_hosts=size)


def _require_alone(membership: Membership) -> None:
    if membership.num_processes > 1:
        raise InputError(
            "jax.distributed",
            "not initialised",
            f"this is {membership.label}, but JAX was already used in it, so it cannot join the others; "
            "join before the first JAX computation, jax.devices() included.",
        )
    logger.warning(
        "JAX was used before dpdist could initialise jax.distributed: training goes on in this process, but "
        "preemption polling is off, so SIGTERM will end it without saving. Restart Python and train first."
    )


def _check_platforms(cluster: config.Cluster, reports: list[dict[str, Any]]) -> None:
    wanted = reports[0]["platform"] if cluster.platform == "auto" else cluster.platform
    for rank, report in enumerate(reports):
        if report["platform"] == wanted:
            continue
        setting = report["JAX_PLATFORMS"]
        reason = f" (JAX_PLATFORMS={setting} is set there)" if setting else ""
        remedy = "set cluster.platform to what there is, before JAX is used."
        if wanted == "gpu":
            remedy = "check nvidia-smi, the GPUs the job requests, and that jax[cuda12] or [cuda13] is there."
        raise InputError(
            "cluster.platform",
            cluster.platform,
            f"rank {rank} of {len(reports)} has {report['platform']}{reason}, not {wanted}; {remedy}",
        )


def _check_device_counts(cluster: config.Cluster, reports: list[dict[str, Any]]) -> None:
    wanted = reports[0]["devices"] if cluster.devices_per_process is None else cluster.devices_per_process
    for rank, report in enumerate(reports):
        if report["devices"] != wanted:
            raise InputError(
                "cluster.devices_per_process",
                cluster.devices_per_process,
                f"rank {rank} of {len(reports)} has {report['devices']} {report['platform']} device(s), not "
                f"{wanted}; change the value, or what the launcher gives each process (under SLURM one GPU).",
            )
