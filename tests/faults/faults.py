"""What can go wrong while a job runs, each brought about by the real thing: a signal, a network, a file system."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jobs import Running

from .disk import Disk
from .network import Host, Pair
from .phases import MAIN_ONLY, PHASES

#: What `disturb` sets in the config. Short, and longer than anything takes that goes well on two busy cores.
HEARTBEAT, WATCHDOG, SHUTDOWN, INITIALIZATION = 10, 12, 15, 45
#: A job that died on another host is known to be dead after this long; the hosts of `network` are others.
LEASE = 10
#: Seconds for what needs no waiting: the launcher's grace, process 0's last seconds, and a busy machine.
PROMPT = 20.0
#: Seconds until a rank that nobody hears of has ended the job: the longest wait, and then as above.
UNHEARD = INITIALIZATION + SHUTDOWN + PROMPT
#: Seconds for a job that goes on to its end.
TO_THE_END = 90.0

KILLED = 128 + signal.SIGKILL
#: A rank that misses another ends by its watchdog, by an error of its own, or by JAX's (SIGABRT).
MISSING = frozenset({124, 1, 128 + signal.SIGABRT})
FINISHED, PREEMPTED = 0, 75


@dataclass
class Scene:
    """A job that has been stopped at a phase, and what it runs on."""

    running: Running
    ranks: dict[int, int]
    gate: Path
    world: Host | Pair | Disk | None

    def go(self, how: str = "") -> None:
        """Let the stopped rank go on; with `raise`, by an exception."""
        temporary = self.gate / ".go"
        temporary.write_text(how)
        temporary.replace(self.gate / "go")

    @property
    def disk(self) -> Disk:
        assert isinstance(self.world, Disk)
        return self.world

    @property
    def pair(self) -> Pair:
        assert isinstance(self.world, Pair)
        return self.world

    @property
    def host(self) -> Host:
        assert isinstance(self.world, Host)
        return self.world


@dataclass(frozen=True)
class Fault:
    """A fault, how it is made, and what may come of it."""

    name: str
    inject: Callable[[Scene], None]
    #: How the job may end.
    codes: frozenset[int]
    #: Seconds within which it must.
    bound: float
    #: The rank that is stopped at the phase and that the fault is about.
    rank: int = 0
    #: What the job says, and what its private logs say.
    said: str = ""
    logged: str = ""
    world: Literal["plain", "host", "pair", "disk"] = "plain"
    #: Undoes it before the job is run again.
    repair: Callable[[Scene], None] = field(default=lambda scene: None)
    #: A checkpoint that was not yet synchronised may be damaged, so that the run must go on as a new incarnation.
    may_lose: bool = False
    #: Why it makes no sense at some phases.
    not_at: dict[str, str] = field(default_factory=dict)

    def stops(self, phase: str) -> int:
        """The rank to stop at the phase."""
        return 0 if phase in MAIN_ONLY else self.rank


def signalled(number: int, rank: int | None) -> Callable[[Scene], None]:
    """A signal to a rank, or to the launcher."""
    return lambda scene: os.kill(scene.running.pid if rank is None else scene.ranks[rank], number)


def stopped_for(seconds: float, rank: int) -> Callable[[Scene], None]:
    """SIGSTOP, and SIGCONT after a while."""

    def go_on(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def inject(scene: Scene) -> None:
        os.kill(scene.ranks[rank], signal.SIGSTOP)
        threading.Timer(seconds, go_on, [scene.ranks[rank]]).start()

    return inject


def terminated(scene: Scene) -> None:
    """The preemption notice, which JAX looks for once a second: the job is at the phase when it is noticed."""
    os.kill(scene.running.pid, signal.SIGTERM)
    time.sleep(2.5)


def raised(scene: Scene) -> None:
    scene.go("raise")


def partitioned_for(seconds: float) -> Callable[[Scene], None]:
    """No packet passes for a while: TCP sends again what was lost."""

    def inject(scene: Scene) -> None:
        scene.pair.link("drop")
        threading.Timer(seconds, scene.pair.link, ["pass"]).start()

    return inject


_SAME = "slow packets show at every phase alike"
_GOES_ON = frozenset({FINISHED})

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill rank 0", signalled(signal.SIGKILL, 0), frozenset({KILLED}), PROMPT, 0, "rank 0 of 2 was ended"),
        Fault("kill rank 1", signalled(signal.SIGKILL, 1), frozenset({KILLED}), PROMPT, 1, "rank 1 of 2 was ended"),
        Fault("kill launcher", signalled(signal.SIGKILL, None), frozenset({-signal.SIGKILL}), PROMPT),
        Fault("terminate", terminated, frozenset({PREEMPTED}), TO_THE_END),
        Fault("exception in rank 0", raised, frozenset({1}), PROMPT, 0, "dpdist: failed", "InjectedError"),
        Fault(
            "exception in rank 1",
            raised,
            frozenset({1}),
            PROMPT,
            1,
            "dpdist: failed",
            "InjectedError",
            not_at=dict.fromkeys(MAIN_ONLY, "only rank 0 comes through it"),
        ),
        Fault("stop rank 0", signalled(signal.SIGSTOP, 0), MISSING, UNHEARD, 0),
        Fault("stop rank 1", signalled(signal.SIGSTOP, 1), MISSING, UNHEARD, 1),
        Fault("stop rank 1 for 3 s", stopped_for(3.0, 1), _GOES_ON, TO_THE_END, 1),
        Fault("network down", lambda scene: scene.host.cut(), MISSING, UNHEARD, world="host"),
        Fault("partition", lambda scene: scene.pair.link("drop"), MISSING, UNHEARD, world="pair"),
        Fault("partition for 3 s", partitioned_for(3.0), _GOES_ON, TO_THE_END, world="pair"),
        Fault(
            "2% packets lost",
            lambda scene: scene.pair.link("lose 2"),
            _GOES_ON,
            TO_THE_END,
            world="pair",
            not_at={phase: _SAME for phase in PHASES if phase not in ("start-up", "mid-accumulate", "save begin")},
        ),
        Fault(
            "disk full",
            lambda scene: scene.disk.fill(),
            frozenset({1, 2}),
            UNHEARD,
            world="disk",
            repair=lambda scene: scene.disk.free(),
        ),
        Fault("disk slow", lambda scene: scene.disk.freeze(seconds=1.0, times=3), _GOES_ON, TO_THE_END, world="disk"),
        Fault(
            "disk dies",
            lambda scene: scene.disk.fail(),
            frozenset({1, 2}),
            UNHEARD,
            world="disk",
            repair=lambda scene: scene.disk.repair(),
            may_lose=True,
        ),
    )
}

#: Where a fault comes too late to end the job as it does elsewhere.
TOO_LATE = {("terminate", "shutdown"), ("disk full", "shutdown"), ("disk dies", "shutdown")}
