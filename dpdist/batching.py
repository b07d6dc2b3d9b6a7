"""`physical_batch_size: auto`: the microbatch shapes with the least expected padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    *, dataset_size: int, sampling_probability: float, host_of_device: Sequence[int], balanced: bool, platform: str
) -> int:
    """The physical batch size, up to the platform's useful largest, that costs least in expectation."""
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

    return min(range(1, LARGEST.get(platform, LARGEST["gpu"]) + 1), key=lambda p: (cost(p), -p))
