"""The user's module of a disturbed run: it stops one rank at a phase, so that a fault meets it exactly there.

It is named in the config as the data source, so every rank imports it before it has built anything, and what it wraps
is what the rank will call. The environment says where to stop; none of it is part of the config, so a run that is
stopped is the same run as one that is not:

    FAULT_PHASE, FAULT_RANK   a name of `PHASES`, and the rank that stops there
    FAULT_AT                  steps that the rank must have taken before (in this process)
    FAULT_DIR                 where `PHASE.RANK.reached` appears then, and where a file `go` lets it go on; where that
                              holds `raise`, by an exception
    FAULT_NOISE               draw other noise than the run should: a defect that the invariants must find
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import userland
from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.path import atomicity

from dpdist.data import Source
from dpdist.mechanism.step import StepPrograms
from dpdist.program.evaluate import Evaluator
from dpdist.run.checkpoint import Checkpoints

#: In the order in which a run comes through them.
PHASES = (
    "start-up",
    "first compile",
    "mid-accumulate",
    "noise",
    "all-reduce",
    "update",
    "save begin",
    "save middle",
    "save commit",
    "committed",
    "evaluation",
    "shutdown",
)
#: Through these only rank 0 comes.
MAIN_ONLY = ("save commit", "committed")
#: Seconds until a stopped rank goes on by itself: the harness is gone.
BOUND = 180.0


class InjectedError(RuntimeError):
    """What a rank raises when it is told to fail."""


class Gate:
    """Stops this process once, at the phase that the environment names."""

    def __init__(self) -> None:
        rank = os.environ.get("DPDIST_PROCESS_ID") or os.environ.get("SLURM_PROCID") or "0"
        wanted = os.environ.get("FAULT_RANK") == rank
        self.phase = os.environ.get("FAULT_PHASE") if wanted else None
        self.after = int(os.environ.get("FAULT_AT", "0"))
        self.steps = 0

    def hold(self, phase: str) -> None:
        """Stop here if this is the place."""
        if phase != self.phase or self.steps < self.after:
            return
        self.phase = None  # once
        directory = Path(os.environ["FAULT_DIR"])
        (directory / f"{phase}.{os.environ['FAULT_RANK']}.reached").touch()
        deadline, go = time.monotonic() + BOUND, directory / "go"
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if go.exists() and go.read_text() == "raise":
            raise InjectedError(f"injected at {phase!r}")


def wrap(owner: Any, name: str, gate: Gate, *, before: str = "", after: str = "") -> None:
    """Make `owner.name` stop before it begins and after it has ended."""
    wrapped = getattr(owner, name)

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        gate.hold(before)
        result = wrapped(*arguments, **keywords)
        gate.hold(after)
        return result

    setattr(owner, name, wrapper)


def watch_steps(gate: Gate) -> None:
    """Stop around the one program that reduces, adds the noise and updates; count the steps."""
    apply = StepPrograms.apply

    def wrapper(self: StepPrograms, *arguments: Any) -> Any:
        gate.hold("all-reduce")
        result = apply(self, *arguments)
        if gate.phase == "update":
            jax.block_until_ready(result)
            gate.hold("update")
        gate.steps += 1
        return result

    StepPrograms.apply = wrapper  # type: ignore[method-assign]


def watch_commits(gate: Gate) -> None:
    """Stop around the rename that makes a checkpoint count."""
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def wrapper(self: Any) -> None:
        whole = self.get_final().name.isdecimal()  # its parts are renamed too
        if whole:
            gate.hold("save commit")
        await finalize(self)
        if whole:
            gate.hold("committed")

    atomicity.AtomicRenameTemporaryPath.finalize = wrapper


def watch_the_end(gate: Gate) -> None:
    """Stop before the last barrier: the summary is written, nobody has left."""
    module = sys.modules["dpdist.trainer"]
    barrier = module.barrier

    def wrapper(name: str, *arguments: Any, **keywords: Any) -> None:
        if name == "end":
            gate.hold("shutdown")
        barrier(name, *arguments, **keywords)

    module.barrier = wrapper


def draw_other_noise() -> None:
    """The defect: every step draws what belongs to another step."""
    draw = StepPrograms.draw
    StepPrograms.draw = lambda self, keys, step: draw(self, keys, step + 1000)  # type: ignore[method-assign]


def install() -> Gate:
    """Wrap what this process is going to call."""
    gate = Gate()
    if os.environ.get("FAULT_NOISE"):
        draw_other_noise()
    if gate.phase is not None:
        wrap(jax.stages.Lowered, "compile", gate, before="first compile")
        wrap(StepPrograms, "accumulate", gate, after="mid-accumulate")
        wrap(StepPrograms, "draw", gate, before="noise")
        watch_steps(gate)
        wrap(Checkpoints, "save", gate, before="save begin")
        wrap(async_checkpointer, "_background_wait_for_commit_futures", gate, before="save middle")
        watch_commits(gate)
        wrap(Evaluator, "measure", gate, before="evaluation")
        watch_the_end(gate)
    return gate


def arrays() -> tuple[Source, Source]:
    """The data of `userland`."""
    install().hold("start-up")
    return userland.arrays()
