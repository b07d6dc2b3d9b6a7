"""Every fault at every phase, and a table of what happened.

    python -m tests.faults.matrix --out docs/faults-matrix.md

Needs root, on a Linux with network namespaces, TUN devices and loop mounts. What is done is kept in a file beside the
table, so that the same command goes on after an interruption; `--fresh` begins anew. It exits with 1 if a cell shows
what must not be.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from . import disk, faults, network
from .faults import FAULTS
from .harness import Bench, Outcome, disturb
from .phases import PHASES

#: Where a run goes on that did not go on where it was: on one process with two devices, and on four processes.
ELSEWHERE = {
    ("kill rank 0", "all-reduce"): (1, 2),
    ("terminate", "noise"): (1, 2),
    ("kill rank 1", "save middle"): (4, 1),
}

HEAD = """# What happens when ...

Two processes on one machine under the real launcher; a rank is held at the phase while the fault happens, so that it
meets the run exactly there. Then the same command is run again. A cell says how the disturbed job ended (the launcher's
exit code, and the seconds from the fault to the end) or that it went on. Every run has then finished with the
undisturbed run's parameters, bit for bit, and with its epsilon; every step sampled the same examples and drew the same
noise whenever it was taken, and the ledger charges each once. Where the disk died, a checkpoint that had its name and
was not yet synchronised is damaged; it may have been seen, so the run goes on from the one before as another
incarnation, with fresh noise and all of it charged. A cell in which anything else happened is **bold**. A dash stands
where the fault makes no sense, see below.

The bounds in the config: heartbeat {heartbeat} s, watchdog {watchdog} s a step, shutdown {shutdown} s, initialization
{initialization} s. Exit codes: 137 ended by SIGKILL, 134 by SIGABRT (JAX's own end of a rank that misses another), 124
the watchdog, 75 preempted and saved, 1 failed, 2 bad input, -9 the launcher itself was killed.

Made by `python -m tests.faults.matrix`: {cells} cells, of which {violated} show what must not be;
one after another they took {minutes:.0f} minutes.

"""


def cells() -> list[tuple[str, str, tuple[int, int]]]:
    """Fault, phase, and where the run goes on."""
    here = [(name, phase, (2, 1)) for name, fault in FAULTS.items() for phase in PHASES if phase not in fault.not_at]
    return here + [(*cell, topology) for cell, topology in ELSEWHERE.items()]


def key(record: dict[str, Any]) -> tuple[str, str, tuple[int, int]]:
    return record["fault"], record["phase"], tuple(record["topology"])


def work(todo: queue.SimpleQueue[tuple[str, str, tuple[int, int]]], results: Path, lock: threading.Lock) -> None:
    """Cells, one after another, until none is left."""
    root = Path(tempfile.mkdtemp(prefix="dpdist-matrix-"))
    bench = Bench(root)
    try:
        while True:
            try:
                fault, phase, topology = todo.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            try:
                outcome = disturb(bench, FAULTS[fault], phase, again=topology)
            except Exception as error:
                outcome = Outcome(
                    fault, phase, topology=topology, violations=[f"{type(error).__name__}: {error}"[:500]]
                )
            took = time.monotonic() - began
            with lock, results.open("a") as file:
                file.write(json.dumps(outcome.record() | {"took": round(took, 1)}) + "\n")
                print(f"{fault:20} {phase:15} {topology} {took:5.1f} s  {outcome.text}", flush=True)
    finally:
        bench.close()
        shutil.rmtree(root, ignore_errors=True)


def table(records: list[dict[str, Any]]) -> str:
    """The page."""
    outcomes = {
        key(r): Outcome(**{k: v for k, v in (r | {"topology": tuple(r["topology"])}).items() if k != "took"})
        for r in records
    }
    text = HEAD.format(
        heartbeat=faults.HEARTBEAT,
        watchdog=faults.WATCHDOG,
        shutdown=faults.SHUTDOWN,
        initialization=faults.INITIALIZATION,
        cells=len(outcomes),
        minutes=sum(record["took"] for record in records) / 60,
        violated=sum(bool(outcome.violations) for outcome in outcomes.values()),
    )
    text += "| fault | " + " | ".join(PHASES) + " |\n" + "| --- " * (len(PHASES) + 1) + "|\n"
    for name in FAULTS:
        row = [outcomes.get((name, phase, (2, 1))) for phase in PHASES]
        shown = [
            ("" if phase not in FAULTS[name].not_at else "-") if o is None else o.text
            for o, phase in zip(row, PHASES, strict=True)
        ]
        text += f"| {name} | " + " | ".join(shown) + " |\n"
    text += "\nGone on with elsewhere, with the same samples, noise and epsilon:\n\n"
    for (name, phase), topology in ELSEWHERE.items():
        outcome = outcomes.get((name, phase, topology))
        if outcome is not None:
            where = f"{topology[0]} process(es) with {topology[1]} device(s) each"
            text += f"- {name} at {phase}, then on {where}: {outcome.text}\n"
    text += "\nNo sense:\n\n"
    for name, fault in FAULTS.items():
        for why in sorted(set(fault.not_at.values())):
            at = ", ".join(phase for phase, reason in fault.not_at.items() if reason == why)
            text += f"- {name} at {at}: {why}.\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description="Every fault at every phase.")
    parser.add_argument("--out", type=Path, default=Path("runs/faults-matrix.md"), help="the table")
    parser.add_argument("--results", type=Path, help="what is done, a JSON object a line; OUT.jsonl by default")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time: many of them wait")
    parser.add_argument("--only", default="", help="a pattern that `FAULT at PHASE` must match")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    given = parser.parse_args()
    if why := network.can_be_made() or disk.can_be_made():
        print(f"cannot: {why}", file=sys.stderr)
        return 2
    results = given.results or given.out.with_suffix(".jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        results.unlink(missing_ok=True)
    records = read(results)
    done = {key(record) for record in records}
    todo: queue.SimpleQueue[tuple[str, str, tuple[int, int]]] = queue.SimpleQueue()
    for cell in cells():
        if cell not in done and re.search(given.only, f"{cell[0]} at {cell[1]}"):
            todo.put(cell)
    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(todo, results, lock)) for _ in range(given.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = read(results)
    given.out.write_text(table(records))
    violated = [record for record in records if record["violations"]]
    print(f"{len(records)} cells, {len(violated)} violated; see {given.out}")
    return 1 if violated else 0


def read(results: Path) -> list[dict[str, Any]]:
    """What is done so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    sys.exit(main())
