"""Why a start of a job ended: the cause, by the best evidence in what srun, SLURM, JAX and the ranks have written.

The order of the lines is not the order of events: a rank that dumps core is reported after those that its death has
ended. So a signal by which a program ends itself outranks any exception, and JAX's word on who is missing outranks the
exceptions of those who miss it. Standard library alone; pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Nodes of the job in order, with the number of ranks of each: ranks fill one node after the other.
Layout = Sequence[tuple[str, int]]

#: What srun says of a rank that got a signal, and the exit code that a shell would give it.
SIGNALS = {
    "Killed": 137, "Segmentation fault": 139, "Bus error": 135, "Illegal instruction": 132, "Aborted": 134,
    "Floating point exception": 136, "Terminated": 143, "User defined signal 1": 138, "User defined signal 2": 140,
    "Hangup": 129, "Interrupt": 130,
}  # fmt: skip
#: Signals by which a program ends itself; srun never sends one.
_FAULTS = ("Segmentation fault", "Bus error", "Illegal instruction", "Floating point exception")


#: What `dpdist_launch.failures` says where an exception is the echo of another rank's death.
ECHO = "a connection to another rank broke"

_LABELLED = re.compile(r"^ *(\d+): ?(.*)$")
_DEATH = re.compile(r"^srun: error: ([^\s:]+): tasks? ([\d,-]+): (.*)$")
_ENDING = re.compile(
    r"^srun: .*(Terminating|Job step aborted|forcing job termination)|\*\*\* (STEP|JOB) .* CANCELLED AT"
)
_LAUNCH = re.compile(r"^srun: error: Task launch for \S+ failed on node ([^\s:]+): (.*)$")
_NODE_FAILED = re.compile(r"^srun: error: Node failure on ([^\s:]+)")
_MISSING = re.compile(r"dpdist: failed: (ranks? \[[\d, .]+\].*did not come.*)$")
_BAD = re.compile(r"dpdist: failed: (bad node ([^\s:]+): .*)$")
#: SLURM's words alone: XLA speaks of memory that it then finds elsewhere.
_MEMORY = re.compile(
    r"^(?: *\d+: ?)?(?:slurmstepd|srun)\S*: .*(?:oom.kill event|Out Of Memory|exceeded (?:job )?memory limit)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Death:
    """One line of srun's on ranks of one node."""

    node: str
    ranks: tuple[int, ...]
    #: `Killed`, `exit code 1`, ...
    how: str
    #: srun was ending the step by then, so it may have killed them itself.
    late: bool

    @property
    def text(self) -> str:
        return f"{_ranks(self.ranks)} on {self.node}: {self.how}"


@dataclass(frozen=True)
class Cause:
    """Why a start ended: `kind` decides what is done, `text` is for people, `node` is where it happened if known."""

    kind: str
    text: str
    node: str | None = None


def cause_of(log: Sequence[str], layout: Layout, code: int | None) -> Cause:
    """Why this start ended, by the best evidence in its log."""
    deaths = deaths_of(log)
    said = [(rank, text) for line in log for rank, text in [_labelled(line)]]
    for rank, text in said:
        if found := re.search(r"dpdist(?: job)?: error: .*", text):
            passing = "start the job again" in found[0]  # such as a port that another program has
            return Cause("cut off" if passing else "input", _named(found[0], rank, layout))
    for line in log:
        if _MEMORY.search(line):
            return Cause("memory", f"out of memory ({line.strip()}); give the job more with --mem")
    for line in log:
        if found := _NODE_FAILED.match(line):
            return Cause("lost", f"node {found[1]} failed, says SLURM", found[1])
        if found := _LAUNCH.match(line):
            return Cause("lost", f"node {found[1]} could not start its ranks ({found[2]})", found[1])
    for _, text in said:
        if found := _MISSING.search(text):
            alone = re.search(r"\] \(([^,)]+)\)", found[1])
            return Cause("lost", found[1], alone[1] if alone else None)
        if found := _BAD.search(text):
            return Cause("bad", found[1], found[2])
    # A program ends itself by such a signal, and the others' errors are its echo, though they may be heard first.
    for death in deaths:
        if death.how.startswith(_FAULTS):
            return Cause("crashed", death.text, death.node)
    for death in deaths:
        if death.how == "Killed" and not death.late:
            return Cause("killed", death.text, death.node)
    for rank, text in said:
        if "watchdog: " in text:
            return Cause("stuck", _named(text[text.index("watchdog: ") :], rank, layout) + "; the first rank to say so")
    errors = [(rank, text[text.index("dpdist: failed") :]) for rank, text in said if "dpdist: failed" in text]
    named = _unheard(said)
    for rank, text in errors:
        if ECHO not in text and (not named or rank in named):  # the others may fail for the lack of it
            return Cause("failed", _named(text, rank, layout))
    if named:
        nodes = tuple(dict.fromkeys(node for rank in named if (node := node_of(rank, layout))))
        where = f" on {listed(nodes)}" if nodes else ""
        text = f"{_ranks(named)}{where} stopped answering (no heartbeat)"
        return Cause("lost", text, nodes[0] if len(nodes) == 1 else None)
    if any("Either the leader task was preempted/died" in text for _, text in said):
        node = node_of(0, layout)
        return Cause("lost", f"rank 0{f' on {node}' if node else ''} ended without a word", node)
    for rank, text in errors:
        return Cause("cut off", f"{_named(text, rank, layout)}; which rank ended first cannot be told from the log")
    if deaths:
        kind = "unknown" if deaths[0].how in SIGNALS or deaths[0].how == "exit code 124" else "failed"
        return Cause(kind, f"first of all, {deaths[0].text}", deaths[0].node)
    return Cause("failed" if code in range(1, 128) else "unknown", "the log does not say why")


def _unheard(said: Sequence[tuple[int | None, str]]) -> tuple[int, ...]:
    """The ranks that JAX's coordination service misses: numbers on the lines after its message."""
    ranks: list[int] = []
    listing: int | bool | None = False
    for rank, text in said:
        if listing is not False and rank == listing and re.fullmatch(r"[\d, ]+", text.strip() or "-"):
            ranks += [int(number) for number in re.findall(r"\d+", text)]
        else:
            listing = rank if text.rstrip().endswith("(stopped sending heartbeats):") else False
    return tuple(sorted(set(ranks)))


def deaths_of(log: Sequence[str]) -> list[Death]:
    """What srun says of ranks, in its order."""
    deaths, ending = [], False
    for line in log:
        if found := _DEATH.match(line):
            how = found[3].strip().removeprefix("Exited with ").removesuffix(" (core dumped)")
            deaths.append(Death(found[1], _numbers(found[2]), how, ending))
        ending = ending or bool(_ENDING.search(line))
    return deaths


def failed_nodes(log: Sequence[str]) -> tuple[str, ...]:
    """The nodes that SLURM has given up."""
    return tuple(dict.fromkeys(found[1] for line in log if (found := _NODE_FAILED.match(line))))


def node_of(rank: int, layout: Layout) -> str | None:
    """The node of a rank: ranks fill one node after the other."""
    for node, tasks in layout:
        if rank < tasks:
            return node
        rank -= tasks
    return None


def _labelled(line: str) -> tuple[int | None, str]:
    found = _LABELLED.match(line)
    return (int(found[1]), found[2]) if found else (None, line)


def _named(text: str, rank: int | None, layout: Layout) -> str:
    """`text`, with who said it."""
    if rank is None or re.search(rf"\brank {rank}\b", text):
        return text
    node = node_of(rank, layout)
    return f"{text} [rank {rank}{f' on {node}' if node else ''}]"


def _numbers(text: str) -> tuple[int, ...]:
    """`0,4-6` -> 0, 4, 5, 6."""
    bounds = [part.partition("-") for part in text.split(",")]
    return tuple(number for low, _, high in bounds for number in range(int(low), int(high or low) + 1))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"task{'s' if len(ranks) > 1 else ''} {shown}"


def listed(nodes: Sequence[str]) -> str:
    return ", ".join(nodes)
