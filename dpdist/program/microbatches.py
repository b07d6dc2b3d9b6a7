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
    """Return the size of the smaller tail microbatch compiled beside `physical`: half of it, which pads least."""
    return max(1, physical // 2)


def expected_rows(
    physical: int, *, dataset_size: int, sampling_probability: float, hosts: int, devices: int, assignment: str
) -> float:
    """Return the expected number of rows that a step waits for, padding and launch cost included.

    It waits for the device with the most examples. Sample sizes are binomial, approximated here by normal quantiles.
    With the `shard` assignment every host has its own sample size, independent of the others, and the largest counts.

    Args:
        physical: physical batch size.
        hosts: number of hosts.
        devices: number of devices of all hosts together.
        assignment: as in `dpdist.mechanism.sampling.assign`.
    """
    groups = hosts if assignment == "shard" else 1
    mean = dataset_size * sampling_probability / groups
    spread = math.sqrt(mean * (1 - sampling_probability))
    share = devices / groups
    total = 0.0
    for u in _QUANTILES:
        drawn = max(0, mean + spread * NormalDist().inv_cdf(u ** (1 / groups)))
        local = (
            _most_chunked(math.ceil(drawn), physical, devices) if assignment == "chunks" else math.ceil(drawn / share)
        )
        sizes = microbatch_sizes(local, physical, tail_of(physical))
        total += sum(sizes) + _LAUNCH_EXAMPLES * len(sizes)
    return total / len(_QUANTILES)


def _most_chunked(drawn: int, physical: int, devices: int) -> int:
    """The most examples on a device where whole chunks of `physical` go to devices in turn."""
    full, rest = divmod(drawn, physical)
    each, more = divmod(full, devices)
    return (each + 1) * physical if more else each * physical + rest


def choose_physical_batch(
    *, dataset_size: int, sampling_probability: float, host_of_device: Sequence[int], assignment: str, largest: int
) -> int:
    """Return the physical batch size from 1 to `largest` with the smallest `expected_rows`; of equals, the larger.

    Args:
        host_of_device: host index of every device.
        assignment: as in `dpdist.mechanism.sampling.assign`.
    """
    hosts, devices = max(host_of_device) + 1, len(host_of_device)

    def cost(physical: int) -> float:
        return expected_rows(
            physical,
            dataset_size=dataset_size,
            sampling_probability=sampling_probability,
            hosts=hosts,
            devices=devices,
            assignment=assignment,
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
