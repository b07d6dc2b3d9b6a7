"""One disturbed run: stop it at a phase, let the fault happen, see it end, run it again, compare."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jobs import CONFIG, STEPS, Jobs, Run, Running, wait_all, wait_for

from . import disk, invariants, network
from .faults import FINISHED, HEARTBEAT, INITIALIZATION, LEASE, SHUTDOWN, TOO_LATE, WATCHDOG, Fault, Scene

#: Steps after which the phases of a step are met: no multiple of what is saved, so that some are replayed.
AFTER = {"start-up": 0, "first compile": 0, "shutdown": 0}
LATER = 6
#: Seconds until a run is at its phase, and until one that is run again has ended.
ARRIVE, AGAIN = 120.0, 150.0


@dataclass
class Outcome:
    """What happened to one disturbed run."""

    fault: str
    phase: str
    #: Exit code of the launcher, and seconds from the fault to its end; None where it did not end in time.
    code: int | None = None
    seconds: float = 0.0
    #: What the job said last.
    said: str = ""
    #: How the run ended that was started again, on so many processes and devices each.
    again: int | None = None
    topology: tuple[int, int] = (2, 1)
    #: The incarnation as which it ended.
    incarnation: int = 0
    #: What must not be; empty where all is well.
    violations: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """For a table."""
        if self.violations:
            return "**" + "; ".join(self.violations[:3])[:300] + "**"
        how = "goes on" if self.code == FINISHED else "ends"
        anew = f"; then incarnation {self.incarnation}" if self.incarnation else ""
        return f"{how}: {self.code} after {self.seconds:.1f} s{anew}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """Where disturbed runs are made, and the undisturbed ones they are compared with."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs(root)
        shutil.copy(Path(__file__).with_name("phases.py"), root)
        config = {section: dict(values) for section, values in CONFIG.items()}
        config["data"]["source"] = "phases:arrays"
        config["cluster"] |= {
            "heartbeat_timeout": HEARTBEAT,
            "watchdog_timeout": WATCHDOG,
            "shutdown_timeout": SHUTDOWN,
            "initialization_timeout": INITIALIZATION,
            "lease_timeout": LEASE,
        }
        self.jobs.config.write_text(yaml.safe_dump(config))
        self._references: dict[tuple[int, int], Run] = {}

    def reference(self, processes: int, devices: int) -> Run:
        """The run that nobody disturbs."""
        if (processes, devices) not in self._references:
            run = self.jobs.new(f"undisturbed-{processes}x{devices}")
            wait_all(self.jobs.ranks(run, processes, devices))
            self._references[processes, devices] = run
        return self._references[processes, devices]

    def close(self) -> None:
        self.jobs.close()

    def start(self, run: Run, world: Any, gate: Path, phase: str, rank: int) -> Running:
        """Two processes under the real launcher, to stop at the phase."""
        jobs = self.jobs
        train = ["train", str(jobs.config), "cluster.devices_per_process=1", "--run-dir", str(run.root)]
        command = [sys.executable, "-m", "launch", *train, "--processes", "2"]
        if isinstance(world, network.Host):
            command = [*world.enter, *command]
        elif isinstance(world, network.Pair):
            command = world.launch(train)
        told = {
            "FAULT_PHASE": phase,
            "FAULT_RANK": str(rank),
            "FAULT_AT": str(AFTER.get(phase, LATER)),
            "FAULT_DIR": str(gate),
        }
        return jobs.program(command, **told)


@contextlib.contextmanager
def world_of(fault: Fault) -> Iterator[Any]:
    """What the job runs on."""
    makers = {"host": network.one_host, "pair": network.two_hosts, "disk": disk.own_disk}
    with makers.get(fault.world, contextlib.nullcontext)() as world:
        yield world


def disturb(
    bench: Bench,
    fault: Fault,
    phase: str,
    *,
    again: tuple[int, int] = (2, 1),
    environ_again: dict[str, str] | None = None,
) -> Outcome:
    """Let `fault` happen to a run at `phase`, run it again, and say what is not as it should be.

    Args:
        again: processes, and devices each, of the run that goes on.
        environ_again: what its environment holds besides.
    """
    outcome = Outcome(fault.name, phase, topology=again)
    reference = bench.reference(*again)
    with world_of(fault) as world:
        gate = bench.jobs.new("gate").root
        gate.mkdir()
        run = Run(world.root / "run") if isinstance(world, disk.Disk) else bench.jobs.new("disturbed")
        held = fault.stops(phase)
        running = bench.start(run, world, gate, phase, held)
        scene = Scene(running, {}, gate, world)
        try:
            wait_for(lambda: at_the_phase(scene, phase, held), ARRIVE, every=0.02)
            scene.ranks = running.ranks()
            see_it_end(scene, fault, run, outcome)
        finally:
            scene.go()
            running.exit_code(0)
        fault.repair(scene)
        outcome.violations += invariants.of_any(run, STEPS)
        go_on(bench, fault, run, reference, outcome, environ_again or {})
    return outcome


def at_the_phase(scene: Scene, phase: str, rank: int) -> bool:
    """Whether the rank has stopped; an error where the job ended before."""
    err = scene.running.stderr.read_text()
    assert "ending the others" not in err, f"it failed before it came to {phase!r}:\n{err}"
    return (scene.gate / f"{phase}.{rank}.reached").exists() and len(scene.running.ranks()) == 2


def see_it_end(scene: Scene, fault: Fault, run: Run, outcome: Outcome) -> None:
    """Inject, wait, and note how it ended."""
    began = time.monotonic()
    fault.inject(scene)
    if not (scene.gate / "go").exists():
        scene.go()
    outcome.code = scene.running.exit_code(fault.bound)
    outcome.seconds = round(time.monotonic() - began, 1)
    err = scene.running.stderr.read_text()
    outcome.said = last_words(err)
    codes = fault.codes | ({FINISHED} if (fault.name, outcome.phase) in TOO_LATE else set())
    if outcome.code is None:
        outcome.violations.append(f"still running {fault.bound:g} s after the fault")
    elif outcome.code not in codes:
        outcome.violations.append(f"exit code {outcome.code}, not one of {sorted(codes)}")
    if fault.said not in err:
        outcome.violations.append(f"the job did not say {fault.said!r} but {outcome.said!r}")
    if fault.logged and fault.logged not in run.logs:
        outcome.violations.append(f"{fault.logged!r} is not in the logs")
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not alive(scene), 10.0, every=0.02)
    if left := alive(scene):
        outcome.violations.append(f"ranks {left} outlived the job")


def last_words(err: str) -> str:
    """Of all that a job says at its end, the lines that say why."""
    why = [
        line
        for line in err.splitlines()
        if re.search(r"launcher: rank|dpdist: (failed|error|finished|preempted)|watchdog: ", line)
    ]
    return " / ".join(re.sub(r"; (what it says is|see|stacks).*", "", line) for line in why[-3:])


def alive(scene: Scene) -> list[int]:
    """Ranks that still run."""
    found = []
    for rank, pid in scene.ranks.items():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found.append(rank)
    return found


def go_on(bench: Bench, fault: Fault, run: Run, reference: Run, outcome: Outcome, environ: dict[str, str]) -> None:
    """Run the same command again, and compare what comes out with the undisturbed run."""
    processes, devices = outcome.topology
    ended = [rank.exit_code(AGAIN) for rank in bench.jobs.ranks(run, processes, devices, **environ)]
    outcome.again = next((code for code in ended if code != 0), 0)
    if outcome.again != FINISHED:
        outcome.violations.append(f"run again, its ranks ended with {ended}")
        return
    outcome.incarnation = run.summary["incarnation"]
    if outcome.incarnation and fault.may_lose:
        outcome.violations += invariants.of_begun_anew(run, reference)
        return
    same = outcome.topology == (2, 1)
    outcome.violations += invariants.of_finished(run, reference, same_topology=same)
