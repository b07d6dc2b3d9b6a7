"""What a device holds while it trains, and how much it may hold: what `physical_batch_size: auto` is chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from dpdist.cluster.agreement import all_gather
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.step import StepPrograms, TrainState


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    #: Parameters, optimizer state, average.
    state: int
    #: The vector that sums are added up in: 64-bit integers where noise is added, float32 where not.
    sums: int
    #: Examples that have been read ahead.
    prefetched: int
    #: Temporary memory of the largest program that clips and sums, as XLA's analysis states it.
    temporary: int
    #: True if noise is drawn: as large as the sums.
    noisy: bool

    @property
    def needed(self) -> int:
        """The most at any time: while gradients are computed, or while the sums are reduced and the state updated.

        An update holds the state before and after it, and the sums before and after they are reduced.
        """
        update = self.state + (3 if self.noisy else 2) * self.sums
        return self.state + self.prefetched + max(self.sums + self.temporary, update)


def memory_of(
    programs: StepPrograms, state: TrainState, example: Any, physical: int, *, prefetch: int, noisy: bool
) -> Memory:
    """What training needs on one device.

    Args:
        example: shapes and dtypes of one example, by column.
        physical: examples in a microbatch.
        prefetch: microbatches that are read ahead; one more is being computed, and one being read.
        noisy: whether noise is drawn.
    """
    rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(example))
    return Memory(
        state=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        sums=(8 if noisy else 4) * programs.parameters,
        prefetched=(prefetch + 2) * physical * (rows + 8),
        temporary=_temporary(programs),
        noisy=noisy,
    )


def _temporary(programs: StepPrograms) -> int:
    analyses = [program.memory_analysis() for name, program in programs.compiled().items() if "accumulate" in name]
    return max((int(analysis.temp_size_in_bytes) for analysis in analyses if analysis is not None), default=0)


def memory_limit(config: Config, world: World) -> float:
    """Bytes that a device may hold: what the backend reports, or the config's where it does not.

    The smallest over all processes, so that all decide alike.
    """
    statistics = world.mesh.local_devices[0].memory_stats() or {}
    own = float(statistics.get("bytes_limit", config.cluster.memory_per_device * 2**30))
    return min(all_gather(own, world))
