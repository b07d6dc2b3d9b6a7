"""Facts of the device, the machine and the versions. usage: python -m dpdist_launch.measure.gpu.facts --to FILE"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpdist.run.directory import write_atomically
from dpdist_launch.measure.gpu import platform

_QUERY = "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,clocks.max.memory,mig.mode.current"
_VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES")


def nvidia() -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU that it sees; empty where there is no such program."""
    try:
        ran = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}"}
    first = ran.stdout.splitlines()[0].split(", ") if ran.stdout.strip() else []
    return dict(zip(_QUERY.split(","), first, strict=False))


def facts(to: Path) -> dict[str, Any]:
    """Write what is known to `to`, once before JAX is imported and once after; return it."""
    content: dict[str, Any] = {
        "nvidia": nvidia(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    write_atomically(to, json.dumps(content, indent=2) + "\n")
    import jax

    from dpdist.program.device_rates import table_name
    from dpdist_launch.measure.machine import all_versions, this_machine

    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    content |= {
        "devices": len(jax.devices()),
        "table_name": table_name(device.device_kind),
        "memory_bytes": statistics.get("bytes_limit"),
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "machine": this_machine(),
        "versions": all_versions(peers=True),
    }
    write_atomically(to, json.dumps(content, indent=2) + "\n")
    return content


def main() -> int:
    """Run the program; it fails where JAX sees no GPU and was not told to use the processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    content = facts(parser.parse_args().to)
    machine = content["machine"]
    print(f"{machine['device_kind']} ({machine['platform']}), jax {content['versions']['jax']}")
    if machine["platform"] == "cpu" and platform() == "gpu":
        print("JAX sees no GPU: is jax[cuda12] or jax[cuda13] installed?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
