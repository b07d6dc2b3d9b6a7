"""What a benchmark ran on: processor, devices, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from launch.scaling import machine as scaling_machine

_PROJECT = Path(__file__).parents[2]


def hardware() -> dict[str, Any]:
    """Device, processor, cores and memory."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu() -> str:
    """The processor's name: the platform module knows only its architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(*, peers: bool) -> dict[str, str]:
    """Of all that computes, and the commit of this project's source."""
    found = scaling_machine.versions() | {name: version(name) for name in ("flax", "numpy")}
    if peers:
        found |= {name: version(name) for name in ("jax-privacy", "torch", "opacus")}
    return found | {"commit": _commit()}


def _commit() -> str:
    """Of the source, with `+` where files differ from it; `unknown` outside a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "dpdist", "launch") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", "-C", _PROJECT, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()
