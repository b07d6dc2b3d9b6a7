"""Detect a preemption notice (SIGTERM) at the same step on all processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal

from jax.experimental import multihost_utils

from dpdist.cluster.world import World

# JAX's processes agree on a value of this call count, not on a training step, and JAX reports the notice only at the
# call whose count *equals* that value. So a resumed run must count from 1, not from its step: otherwise the agreed
# value could already have passed, and a notice from start-up would be missed.
_calls = itertools.count(1)


def preempted(world: World) -> bool:
    """Return True once a process of the job received SIGTERM, in the same call on all processes.

    Collective: all processes must call it equally often. Always False if `world.distributed` is False.
    """
    return world.distributed and bool(multihost_utils.reached_preemption_sync_point(next(_calls)))


def listen() -> None:
    """Take SIGUSR1 and SIGUSR2 for the notice too: sites and users ask SLURM for them (`--signal=USR1@300`).

    Unhandled they end the process and lose what is not saved. SIGTERM itself is JAX's, and is sent to it from here.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
