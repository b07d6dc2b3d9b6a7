"""`physical_batch_size: auto`: the microbatch shapes with the least expected padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

from dpdist.mechanism.sampling import microbatch_sizes

# Beyond these a device gains no throughput: per-example gradients leave a CPU's cache (measured on
# the CNN: 3,100 examples/s at 64, 1,450 at 256), and a GPU is saturated.
LARGEST = {"cpu": 64, "gpu": 512}
# A microbatch costs about as much to launch as so many examples cost to process.
_LAUNCH_EXAMPLES = 4
_QUANTILES = [(i + 0.5) / 64 for i in range(64)]


def tail_of(physical: int) -> int:
    """The small microbatch that goes with `physical`: a quarter of it."""
    return max(1, physical // 4)


def expected_rows(
    physical: int, *, dataset_size: int, sampling_probability: float, hosts: int, devices: int, balanced: bool
) -> float:
    """Expected rows a device processes in a step, padding included, plus the cost of launching them.

    The largest local batch decides. Sample sizes are binomial, here through the normal quantiles; with
    `shard` the largest of `hosts` independent ones counts.
    """
    groups = 1 if balanced else hosts
    mean = dataset_size * sampling_probability / groups
    spread = math.sqrt(mean * (1 - sampling_probability))
    share = devices / groups
    total = 0.0
    for u in _QUANTILES:
        local = max(0, math.ceil((mean + spread * NormalDist().inv_cdf(u ** (1 / groups))) / share))
        sizes = microbatch_sizes(local, physical, tail_of(physical))
        total += sum(sizes) + _LAUNCH_EXAMPLES * len(sizes)
    return total / len(_QUANTILES)


def choose_physical_batch(
    *, dataset_size: int, sampling_probability: float, host_of_device: Sequence[int], balanced: bool, largest: int
) -> int:
    """The physical batch size, up to `largest`, that costs least in expectation."""
    hosts, devices = max(host_of_device) + 1, len(host_of_device)

    def cost(physical: int) -> float:
        return expected_rows(
            physical,
            dataset_size=dataset_size,
            sampling_probability=sampling_probability,
            hosts=hosts,
            devices=devices,
            balanced=balanced,
        )

    return min(range(1, largest + 1), key=lambda p: (cost(p), -p))


def largest_that_fits(choose: Callable[[int], int], largest: int, needed: Callable[[int], int], limit: float) -> int:
    """The physical batch size that `choose` prefers among those whose memory is at most `limit`.

    Memory grows about linearly with the batch, so where a size does not fit, the line through what was seen says how
    far to go down; nothing is tried until it runs out. Ends at 1, fitting or not.

    Args:
        choose: the preferred size, given the largest that is allowed.
        largest: allowed to begin with.
        needed: bytes for a size, as its compiled program says.
    """
    seen: list[tuple[int, int]] = []
    while True:
        physical = choose(largest)
        size = needed(physical)
        if size <= limit or physical == 1:
            return physical
        seen.append((physical, size))
        slope = size / physical
        if len(seen) > 1:
            (p0, m0), (p1, m1) = seen[-2:]
            slope = max((m0 - m1) / (p0 - p1), 0.0) or slope
        largest = max(1, min(physical - 1, math.floor(physical - (size - limit) / slope)))
