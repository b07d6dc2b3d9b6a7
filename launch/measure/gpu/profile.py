"""Where the time of one arm goes: the kernels of a few calls, by total time.

usage: python -m dpdist_launch.measure.gpu.profile MODEL FORMAT ARM BATCH --to FILE
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from dpdist.run.directory import write_atomically
from dpdist_launch.measure.bench.arms import jax_arm
from dpdist_launch.measure.bench.clipping import FORMATS
from dpdist_launch.measure.bench.tasks import TASKS, in_dtype, problem_of

CALLS, SHOWN = 3, 30


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


def profile(model: str, form: str, arm: str, batch: int) -> dict[str, Any]:
    """Compile the arm, call it, and return its kernels."""
    dtype, precision = FORMATS[form]
    with jax.default_matmul_precision(precision), tempfile.TemporaryDirectory() as directory:
        program = jax_arm(arm).prepare(problem_of(in_dtype(TASKS[model], dtype), batch))
        program.run()
        with jax.profiler.trace(directory):
            for _ in range(CALLS):
                program.run()
        (found,) = Path(directory).rglob("*.trace.json.gz")
        spent, number = kernels(json.loads(gzip.decompress(found.read_bytes())))
    return {
        "what": f"kernels by total time over {CALLS} calls, in microseconds of one call",
        "model": model,
        "format": form,
        "arm": arm,
        "batch": batch,
        "device": jax.devices()[0].device_kind,
        "microseconds": sum(spent.values()) / CALLS,
        "kernels": [
            {"name": name[:160], "microseconds": us / CALLS, "calls": number[name] / CALLS}
            for name, us in spent.most_common(SHOWN)
        ],
    }


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=TASKS)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("arm")
    parser.add_argument("batch", type=int)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    content = profile(options.model, options.format, options.arm, options.batch)
    write_atomically(options.to, json.dumps(content, indent=2) + "\n")
    first = content["kernels"][0] if content["kernels"] else {"name": "no kernel was seen", "microseconds": 0.0}
    print(f"{content['microseconds']:.0f} us a call, most of it {first['name']}: {first['microseconds']:.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
