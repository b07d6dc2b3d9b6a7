"""Kill a run at random and go on with it, again and again, until told to stop; nothing may tell that it was killed.

    python -m tests.faults.soak --minutes 40 --processes 2,4
    python -m tests.faults.soak --kills 200
    python -m tests.faults.soak --cycles 20 --seed 7

A cycle starts the job, disturbs it at a random moment and checks what it left; the next cycle goes on with the same
run. A run that finishes is compared bit for bit with one that nobody disturbed, and a new one begins. It prints a line
a cycle and JSON at the end, and exits with 1 after any violation. `--seed` repeats what is done and at which step, as
far as the machine keeps time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jobs import Jobs, Run, Running

from . import invariants
from .forked import ForkedJob, end, has_ended

STEPS, EVERY = 60, 5
#: Seconds within which a job that was disturbed must have ended, and one that was not.
BOUND, UNDISTURBED = 180.0, 240.0
#: How often each disturbance is chosen. `none` lets the run come to its end.
KINDS = {"kill": 8, "stop and kill": 2, "terminate": 3, "none": 2, "kill rank": 1, "kill launcher": 1, "preempt": 1}
#: These under the real launcher; the others on ranks that start faster.
LAUNCHED = ("kill rank", "kill launcher", "preempt")
#: How the job may end: as it was ended, at its own end, or by what a rank says that misses another.
MISSING = {1, 124, 128 + signal.SIGABRT}
KILLED, TERMINATED = 128 + signal.SIGKILL, 128 + signal.SIGTERM
CODES: dict[str, set[int]] = {
    "kill": {0, KILLED} | MISSING,
    "stop and kill": {0, KILLED} | MISSING,
    "terminate": {0, 75, TERMINATED},
    "none": {0},
    "kill rank": {0, KILLED},
    "kill launcher": {0, -signal.SIGKILL},
    "preempt": {0, 75, TERMINATED, -signal.SIGTERM},
}


@dataclass
class Tally:
    """What came of all cycles."""

    seed: int
    cycles: int = 0
    #: Cycles in which the disturbance came before the run's end, and ended the job.
    cut_short: int = 0
    finished: int = 0
    replayed: int = 0
    longest: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "cycles": self.cycles,
            "cut_short": self.cut_short,
            "runs_finished": self.finished,
            "exit_codes": dict(sorted(self.codes.items())),
            "longest_seconds_to_end": round(self.longest, 1),
            "steps_replayed": self.replayed,
            "violations": self.violations,
        }


class Soak:
    """The run under way, and the references.

    Args:
        root: a directory to work in.
        between: called with the run between two cycles; for tests of the checks.
    """

    def __init__(self, root: Path, seed: int, processes: list[int], between: Callable[[Run], None] | None = None):
        self.jobs = Jobs(root)
        self.jobs.config.write_text(yaml.safe_dump(digits()))
        # The launcher gives these where processes outnumber the cores; everything here must have the same.
        threads = {"NPROC": "1", "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        self.jobs.environ |= threads
        self.jobs.environ["WARM_IMPORTS"] += " sklearn.datasets"
        self.draw, self.processes, self.between = random.Random(seed), processes, between
        self.tally = Tally(seed)
        self.references: dict[int, Run] = {}
        self.seconds = 30.0
        self.run: Run | None = None
        self.topology = processes[0]

    def reference(self, processes: int) -> Run:
        """The run that nobody disturbs."""
        if processes not in self.references:
            run, began = self.jobs.new(f"undisturbed-{processes}"), time.monotonic()
            job = ForkedJob(self.jobs, run, processes)
            code = job.wait(UNDISTURBED)
            assert code == 0, f"the undisturbed run ended with {code}:\n{job.stderr()}"
            self.seconds = time.monotonic() - began
            self.references[processes] = run
        return self.references[processes]

    def cycle(self) -> str:
        """Start, disturb, check; what happened in a line."""
        if self.run is None:
            self.topology = self.draw.choice(self.processes)
            self.run = self.jobs.new("soaked")
        reference, run, tally = self.reference(self.topology), self.run, self.tally
        before = content(run)
        if self.between is not None:
            self.between(run)
        kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
        moment = Moment(self.draw, self.seconds)
        if kind in LAUNCHED:
            code, seconds = self.under_the_launcher(kind, moment)
        else:
            code, seconds = self.on_forks(kind, moment)

        found = invariants.of_any(run, STEPS, before)
        if code is None:
            found.append(f"still running {seconds:.0f} s after {kind!r}")
        elif code not in CODES[kind]:
            found.append(f"exit code {code} after {kind!r}")
        step = max((record["step"] + 1 for record in run.diagnostics), default=0)
        summary = run.root / "summary.json"
        if finished := summary.exists() and run.summary["status"] == "finished":
            found += invariants.of_finished(run, reference, same_topology=True)
        elif code == 0:
            found.append("exit code 0 and not finished")
        tally.cycles += 1
        tally.cut_short += code not in (0, None) and not finished
        tally.codes[f"{kind}: {code}"] += 1
        tally.longest = max(tally.longest, seconds)
        tally.violations += [f"cycle {tally.cycles}, {run.root}: {violation}" for violation in found]
        line = (
            f"{tally.cycles:4} {run.root.name} x{self.topology} {kind} {moment.text}: code {code} "
            f"after {seconds:.1f} s, step {step}{', finished' if finished else ''}"
        )
        if found:
            self.run = None  # kept as it is, to be looked at
        elif finished and self.draw.random() < 0.7:  # else the next cycle starts a run that has ended
            tally.finished += 1
            tally.replayed += invariants.replayed(run)
            shutil.rmtree(run.root)
            self.run = None
        return line + "".join(f"\n     VIOLATED: {violation}" for violation in found)

    def on_forks(self, kind: str, moment: Moment) -> tuple[int | None, float]:
        """Disturb ranks that no launcher looks after; exit code, and seconds from then to the end."""
        assert self.run is not None
        job = ForkedJob(self.jobs, self.run, self.topology)
        try:
            if kind != "none":
                moment.await_it(self.run, job.running)
            began = time.monotonic()
            victim = job.pid(self.draw.randrange(self.topology))
            if kind == "terminate":
                job.signal_all(signal.SIGTERM)
            elif kind in ("kill", "stop and kill") and victim is not None:
                if kind == "stop and kill":
                    os.kill(victim, signal.SIGSTOP)
                    time.sleep(self.draw.uniform(0, 1))
                end(victim)
            code = job.wait(UNDISTURBED if kind == "none" else BOUND)
            seconds = time.monotonic() - began
            self.explain(kind, code, job.stderr())
            return code, seconds if kind != "none" else 0.0
        finally:
            job.end()
            job.forget()

    def under_the_launcher(self, kind: str, moment: Moment) -> tuple[int | None, float]:
        """The same for a job of the real launcher."""
        assert self.run is not None
        running: Running = self.jobs.launch(self.run, self.topology, 1)
        moment.await_it(self.run, lambda: bool(running.ranks()) or not started(running))
        began = time.monotonic()
        ranks = running.ranks()
        victim = ranks.get(self.draw.randrange(self.topology))
        if kind == "kill rank" and victim is not None:
            os.kill(victim, signal.SIGKILL)
        elif kind == "kill launcher":
            os.kill(running.pid, signal.SIGKILL)
        elif kind == "preempt":
            os.kill(running.pid, signal.SIGTERM)
        code = running.exit_code(BOUND)
        while not all(has_ended(pid) for pid in ranks.values()):  # they die with their launcher
            if time.monotonic() > began + BOUND:
                return None, BOUND
            time.sleep(0.01)
        self.explain(kind, code, running.stderr.read_text())
        return code, time.monotonic() - began

    def explain(self, kind: str, code: int | None, err: str) -> None:
        """Show what was said where the end was none of those expected."""
        if code is None or code not in CODES[kind]:
            print(err[-4000:], flush=True)


def started(running: Running) -> bool:
    """Whether this launcher has come so far as to start ranks; before, it has none."""
    return "[0]" in running.stdout.read_text() + running.stderr.read_text()


class Moment:
    """When to disturb: mostly at a step, as steps are short and starting up is long; else at any time."""

    def __init__(self, draw: random.Random, seconds: float) -> None:
        self.further = draw.randrange(2 * STEPS // 3) if draw.random() < 0.7 else None
        self.later = draw.uniform(0, 0.2) if self.further is not None else draw.uniform(0, seconds)
        self.text = f"after {self.later:.2f} s" if self.further is None else f"at {self.further} steps more"

    def await_it(self, run: Run, running: Callable[[], bool]) -> None:
        """Until then, or until the job has ended."""
        path, deadline = run.root / "private/diagnostics.jsonl", time.monotonic() + BOUND
        had = lines_of(path)
        while self.further is not None and lines_of(path) < had + self.further and time.monotonic() < deadline:
            if not running():
                break
            time.sleep(0.002)
        due = time.monotonic() + self.later
        while time.monotonic() < due and running():
            time.sleep(0.002)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def content(run: Run) -> bytes:
    """What the ledger holds."""
    ledger = run.root / "ledger.jsonl"
    return ledger.read_bytes() if ledger.exists() else b""


def digits() -> dict[str, Any]:
    """`configs/digits.yaml`, saved often, with a known seed so that runs can be compared."""
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/digits.yaml").read_text())
    config["training"] |= {"steps": STEPS, "record_digests": True}
    config["checkpoint"] |= {"every_steps": EVERY}
    # A given noise: to calibrate it would take seconds at every start of a new run.
    config["privacy"] |= {"insecure_seed": 1, "target_epsilon": None, "noise_multiplier": 4.0}
    config["cluster"] |= {
        "heartbeat_timeout": 30,
        "watchdog_timeout": 60,
        "shutdown_timeout": 60,
        "initialization_timeout": 150,
    }
    return config


def soak(
    root: Path,
    seed: int,
    processes: list[int],
    *,
    minutes: float | None = None,
    cycles: int | None = None,
    kills: int | None = None,
) -> Tally:
    """Cycles until the time is over, so many are done, or so many runs were cut short."""
    deadline = time.monotonic() + 60 * (minutes if minutes is not None else float("inf"))
    it = Soak(root, seed, processes)
    try:
        while time.monotonic() < deadline and it.tally.cycles != cycles and it.tally.cut_short != kills:
            print(it.cycle(), flush=True)
    finally:
        it.jobs.close()
    return it.tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Random kills and resumes.")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--minutes", type=float, help="how long")
    until.add_argument("--cycles", type=int, help="how many")
    until.add_argument("--kills", type=int, help="how many that cut a run short")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--processes", default="2,4", help="numbers of processes a run may have")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="dpdist-soak-"))
    began = time.monotonic()
    processes = [int(number) for number in given.processes.split(",")]
    tally = soak(root, given.seed, processes, minutes=given.minutes, cycles=given.cycles, kills=given.kills)
    print(json.dumps(tally.record() | {"seconds": round(time.monotonic() - began)}))
    if tally.violations:
        print(f"violated; the runs are in {root}; again: --seed {given.seed} --cycles {tally.cycles}", file=sys.stderr)
        return 1
    shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
