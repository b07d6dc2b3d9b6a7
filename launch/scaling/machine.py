"""What a point ran on: devices, hosts, memory and versions."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from dpdist.cluster.agreement import gather
from dpdist.cluster.job import Job
from dpdist.identity import code_digest


def hardware(job: Job) -> dict[str, Any]:
    """Devices, hosts and peak memory of the whole job; every process calls this.

    Hosts are counted by their names, not by SLURM's nodes: virtual nodes of one machine share its cores.
    """
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in job.mesh.local_devices]
    known = [peak for peak in peaks if peak is not None]
    reports = gather(
        {
            "host": socket.gethostname(),
            "cores": os.cpu_count(),
            "resident": _peak_resident_bytes(),
            "device": max(known) if known else None,
        },
        job,
    )
    processes = Counter(report["host"] for report in reports)
    devices = [report["device"] for report in reports if report["device"] is not None]
    return {
        "platform": job.platform,
        "device_kind": job.mesh.devices.flat[0].device_kind,
        "machine": platform.machine(),
        "hosts": len(processes),
        "processes_per_host": max(processes.values()),
        "cores_per_host": min(report["cores"] for report in reports),
        "peak_resident_bytes": max(report["resident"] for report in reports),
        "peak_device_bytes": max(devices) if devices else None,
    }


def versions() -> dict[str, str]:
    """What computes: Python, JAX, and this project by its version and a digest of its source."""
    try:
        installed = version("dpdist")
    except PackageNotFoundError:  # run from its source
        installed = "source"
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "dpdist": installed,
        "code": code_digest()[:12],
    }


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
