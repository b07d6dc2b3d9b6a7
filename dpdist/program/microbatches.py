"""Choose the physical batch size for `physical_batch_size: auto`: least expected padding within device memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

from dpdist.mechanism.sampling import microbatch_sizes

# Larger batches give no more throughput: per-example gradients no longer fit a CPU's cache (measured on the CNN: 3,100
# examples/s at 64, 1,450 at 256), and a GPU is saturated.
LARGEST = {"cpu": 64, "gpu": 512}
# Launching a microbatch takes about as long as processing this many examples.
_LAUNCH_EXAMPLES = 4
_QUANTILES = [(i + 0.5) / 64 for i in range(64)]


def tail_of(physical: int) -> int:
    """Return the size of the smaller tail microbatch compiled beside `physical`: a quarter of it."""
    return max(1, physical // 4)


def expected_rows(
    physical: int, *, dataset_size: int, sampling_probability: float, hosts: int, devices: int, balanced: bool
) -> float:
    """Return the expected number of rows that a device processes in a step, padding and launch cost included.

    All devices run as many microbatches as the one with the most examples. Sample sizes are binomial, approximated here
    by normal quantiles. With the `shard` assignment (`balanced` False) every host has its own sample size, independent
    of the others, and the largest counts.

    Args:
        physical: physical batch size.
        hosts: number of hosts.
        devices: number of devices of all hosts together.
        balanced: True for the `balanced` assignment, False for `shard`.
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
    """Return the physical batch size from 1 to `largest` with the smallest `expected_rows`; of equals, the larger.

    Args:
        host_of_device: host index of every device.
        balanced: True for the `balanced` assignment, False for `shard`.
    """
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
    """Return the physical batch size that `choose` prefers among those that need at most `limit` bytes.

    Memory grows about linearly with the batch size. If a size does not fit, the line through the last two measurements
    gives the next size to try; no program is run until it runs out of memory. Returns 1 even if that does not fit.

    Args:
        choose: returns the preferred size, given the largest that is allowed.
        largest: the largest size allowed at first.
        needed: returns the bytes that the compiled program of a size needs.
        limit: bytes.
    """
    measured: list[tuple[int, int]] = []
    while True:
        physical = choose(largest)
        size = needed(physical)
        if size <= limit or physical == 1:
            return physical
        measured.append((physical, size))
        slope = size / physical
        if len(measured) > 1:
            (p0, m0), (p1, m1) = measured[-2:]
            slope = max((m0 - m1) / (p0 - p1), 0.0) or slope
        largest = max(1, min(physical - 1, math.floor(physical - (size - limit) / slope)))
