"""Has this job been told to leave? Asked together, so that all processes hear it at the same point."""

from __future__ import annotations

import itertools

from jax.experimental import multihost_utils

from dpdist.cluster.world import World

# JAX agrees on a count of questions, not on a training step, and fires where the count *equals* what was agreed. A
# resumed run must therefore not begin to count at its step: a notice that came during start-up would be missed.
_questions = itertools.count(1)


def preempted(world: World) -> bool:
    """True on every process alike once one of them got SIGTERM; every process asks equally often.

    Always False where `jax.distributed` could not be initialised.
    """
    return world.distributed and bool(multihost_utils.reached_preemption_sync_point(next(_questions)))
