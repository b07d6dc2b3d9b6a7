"""Where the time of one arm goes: the kernels of a few calls, by total time."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

CALLS, SHOWN = 3, 60


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """Trace a few calls of a compiled program; returns microseconds and launches of one call, in all and by kernel."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for _ in range(CALLS):
                run()
        (found,) = Path(directory).rglob("*.trace.json.gz")
        spent, number = kernels(json.loads(gzip.decompress(found.read_bytes())))
    return {
        "microseconds": sum(spent.values()) / CALLS,
        "launches": number.total() / CALLS,
        "kernels": [
            {"name": name[:160], "microseconds": us / CALLS, "launches": number[name] / CALLS}
            for name, us in spent.most_common(SHOWN)
        ],
    }


def kernels(trace: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Return microseconds and number of events by name, of the device or, without one, of XLA's threads."""
    events = trace["traceEvents"]
    named: dict[str, dict[Any, str]] = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event.get("name") in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    processes = {pid: name for (pid, _), name in named["process_name"].items()}
    of_device = {row: name for row, name in named["thread_name"].items() if "/device:" in processes.get(row[0], "")}
    # Streams hold the kernels; the device's other rows repeat them by operation, module and step.
    rows = {row for row, name in of_device.items() if name.startswith("Stream")}
    rows = rows or {row for row, name in of_device.items() if name == "XLA Ops"}
    rows = rows or {row for row, name in named["thread_name"].items() if "XLA" in name and not of_device}

    def counts(event: dict[str, Any]) -> bool:
        kernel = bool(of_device) or "::" not in event.get("name", "")  # on the host, XLA's executor has events too
        return event.get("ph") == "X" and (event["pid"], event.get("tid")) in rows and kernel

    spent, number = Counter[str](), Counter[str]()
    for event in filter(counts, events):
        spent[event["name"]] += event["dur"]
        number[event["name"]] += 1
    return spent, number
