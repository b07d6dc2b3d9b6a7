"""Describe what a measurement ran on: devices, hosts, processor, memory, versions and commit."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from dpdist.cluster.agreement import all_gather
from dpdist.cluster.world import World
from dpdist.run.fingerprints import code_digest

_PROJECT = Path(__file__).parents[2]


def this_machine() -> dict[str, Any]:
    """Return device, processor, cores and memory (bytes) of the machine that this process runs on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def whole_job(world: World) -> dict[str, Any]:
    """Return devices, hosts and peak memory (bytes) of all processes together; a collective call.

    Hosts are counted by host name, not by SLURM node: virtual nodes on one machine share its cores.
    """
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in world.mesh.local_devices]
    known = [peak for peak in peaks if peak is not None]
    reports = all_gather(
        {
            "host": socket.gethostname(),
            "cores": os.cpu_count(),
            "resident": _peak_resident_bytes(),
            "device": max(known) if known else None,
        },
        world,
    )
    processes = Counter(report["host"] for report in reports)
    devices = [report["device"] for report in reports if report["device"] is not None]
    return {
        "platform": world.platform,
        "device_kind": world.mesh.devices.flat[0].device_kind,
        "machine": platform.machine(),
        "hosts": len(processes),
        "processes_per_host": max(processes.values()),
        "cores_per_host": min(report["cores"] for report in reports),
        "peak_resident_bytes": max(report["resident"] for report in reports),
        "peak_device_bytes": max(devices) if devices else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, JAX and this project, and a digest of this project's source."""
    try:
        installed = version("dpdist")
    except PackageNotFoundError:  # run from source
        installed = "source"
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "dpdist": installed,
        "code": code_digest()[:12],
    }


def all_versions(*, peers: bool) -> dict[str, str]:
    """Return `versions`, the versions of the other libraries in a benchmark, and this project's commit."""
    found = versions() | {name: version(name) for name in ("flax", "numpy")}
    if peers:
        found |= {name: _installed(name) for name in ("jax-privacy", "torch", "opacus")}
    return found | {"commit": _commit()}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def _cpu() -> str:
    """Return the processor's name; on Linux the platform module knows only its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """Return the source's commit, with `+` if files differ from it; `unknown` outside a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "dpdist", "launch") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", "-C", _PROJECT, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()
