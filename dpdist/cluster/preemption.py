"""Detect a preemption notice (SIGTERM) at the same step on all processes; to a run of one, Ctrl-C is one too."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from jax.experimental import multihost_utils

from dpdist.cluster.world import World

# JAX's processes agree on a value of this call count, not on a training step, and JAX reports the notice only at the
# call whose count *equals* that value. So a resumed run must count from 1, not from its step: otherwise the agreed
# value could already have passed, and a notice from start-up would be missed.
_calls = itertools.count(1)
#: Set once somebody has pressed Ctrl-C in a run of one process, which has nobody to agree with.
_interrupted = threading.Event()


def preempted(world: World) -> bool:
    """Return True once a process of the job received SIGTERM, in the same call on all processes.

    Collective: all processes must call it equally often. Always False if `world.distributed` is False, but for Ctrl-C
    within `interruptible`.
    """
    if _interrupted.is_set():
        return True
    return world.distributed and bool(multihost_utils.reached_preemption_sync_point(next(_calls)))


@contextlib.contextmanager
def interruptible(world: World) -> Iterator[None]:
    """While the block runs, Ctrl-C asks a run of one process to save and leave; a second one ends it at once.

    The ranks of a larger job are left alone: the launcher sends them SIGTERM. So is a program that does something else
    at Ctrl-C, or runs this in another thread than its main one.
    """
    _interrupted.clear()
    ours = world.num_processes == 1 and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        # The second one must not wait for the end of a step; but at a prompt it must not end what the user has there.
        at_prompt = hasattr(sys, "ps1") or "IPython" in sys.modules
        signal.signal(signal.SIGINT, signal.default_int_handler if at_prompt else signal.SIG_DFL)
        os.write(2, b"\ndpdist: leaving after this step, and saving; Ctrl-C again ends it at once\n")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupted.clear()


def listen() -> None:
    """Take SIGUSR1 and SIGUSR2 for the notice too: sites and users ask SLURM for them (`--signal=USR1@300`).

    Unhandled they end the process and lose what is not saved. SIGTERM itself is JAX's, and is sent to it from here.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
