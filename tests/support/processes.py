"""Programs run by real processes that form one JAX job on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from dpdist.cluster.environment import LOCAL_VARIABLES, free_port

PREAMBLE = """
import json, os, sys, time
from dpdist.cluster import agreement
from dpdist.cluster.join import abort, join, leave
from dpdist.config import Cluster
from dpdist.errors import InputError

def cluster(**fields):
    return Cluster(**{"platform": "cpu", "devices_per_process": 2, "initialization_timeout": 60,
                      "shutdown_timeout": 30, **fields})

def report(**facts):
    print("REPORT", json.dumps(facts), flush=True)

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (InputError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
"""


def run_processes(program: str, processes: int, *arguments: str, codes: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """Run `program` as that many processes of one job; what each reported, in the order of ranks."""
    port = free_port()
    running = []
    for rank in range(processes):
        identity = dict(zip(LOCAL_VARIABLES, (str(rank), str(processes), f"127.0.0.1:{port}"), strict=True))
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", PREAMBLE + program, *arguments],
                env={**_without_launchers(), **(identity if processes > 1 else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    reports = []
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode in codes, err
        facts: dict[str, Any] = {"stderr": err, "code": process.returncode}
        for line in out.splitlines():
            if line.startswith("REPORT "):
                facts.update(json.loads(line.removeprefix("REPORT ")))
        reports.append(facts)
    return reports


def _without_launchers() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "DPDIST_", "JAX_", "XLA_FLAGS", "CUDA_VISIBLE"))
    }
