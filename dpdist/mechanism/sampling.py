"""Poisson subsampling and the assignment: which examples are in a step, and which device processes which.

Example i is in step t iff the i-th 64-bit word of a counter-based generator keyed for t is below
round(q * 2^64). Any part of the stream can be generated alone, so a host may draw its own shard
only, and the union over hosts never depends on how many there are. Because the key is shared, every host
can also work out what the others do, and nothing about the assignment is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

_WORDS_PER_COUNTER = 4
_CHUNK = 1 << 20


def threshold(sampling_probability: float) -> int:
    """round(q * 2^64) as an exact integer; `inclusion_probability` is what it amounts to."""
    if not 0 < sampling_probability <= 1:
        raise ValueError(f"the sampling probability must be in (0, 1], not {sampling_probability!r}")
    return max(1, round(Fraction(sampling_probability) * 2**64))


def inclusion_probability(sampling_probability: float) -> float:
    """The probability that is really sampled, threshold / 2^64; this is what the accountant is given.

    The quotient is exact in float64: rounding q * 2^64 never lengthens q's 53-bit significand.
    """
    return float(Fraction(threshold(sampling_probability), 2**64))


def words(key: UInt64[np.ndarray, " 2"], start: int, stop: int) -> UInt64[np.ndarray, " n"]:
    """Words [start, stop) of the Philox4x64 stream of `key` (Salmon et al., SC 2011)."""
    first = start // _WORDS_PER_COUNTER
    skip = start - first * _WORDS_PER_COUNTER
    stream = np.random.Philox(key=key, counter=first)
    return np.asarray(stream.random_raw(stop - start + skip), dtype=np.uint64)[skip:]


def poisson_sample(
    key: UInt64[np.ndarray, " 2"], sampling_probability: float, start: int, stop: int
) -> Int64[np.ndarray, " n"]:
    """The sorted indices in [start, stop) that step `key` includes, each independently with probability q."""
    limit = threshold(sampling_probability)
    if limit == 2**64:  # q = 1: the comparison below would overflow 64 bits
        return np.arange(start, stop, dtype=np.int64)
    parts = [np.empty(0, np.int64)]
    for low in range(start, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        parts.append(np.flatnonzero(words(key, low, high) < np.uint64(limit)) + low)
    return np.concatenate(parts).astype(np.int64)


def shard_bounds(dataset_size: int, hosts: int) -> list[int]:
    """The hosts + 1 boundaries of equal contiguous shards of the data, one a host."""
    return [dataset_size * host // hosts for host in range(hosts + 1)]


@dataclass(frozen=True)
class Assignment:
    """Who processes which example of one step.

    `sample` is the whole Poisson sample, sorted. Device d processes `sample[slices[d][0]:slices[d][1]]` in
    microbatches of the sizes `microbatches`, the same on all devices: the shortfall is padding.
    """

    step: int
    sample: np.ndarray
    slices: tuple[tuple[int, int], ...]
    microbatches: tuple[int, ...]

    def rows(self, device: int, microbatch: int) -> Int64[np.ndarray, " p"]:
        """Example indices of one microbatch on one device; -1 marks padding."""
        begin, end = self.slices[device]
        first = begin + sum(self.microbatches[:microbatch])
        size = self.microbatches[microbatch]
        rows = np.full(size, -1, np.int64)
        taken = self.sample[first : max(first, min(first + size, end))]
        rows[: len(taken)] = taken
        return rows


def microbatch_sizes(largest: int, physical: int, tail: int) -> tuple[int, ...]:
    """Microbatches that hold `largest` examples: full ones of `physical`, then small ones of `tail`.

    Small ones are used while they need fewer rows than another full one, which saves padding; both
    shapes are compiled before the first step.
    """
    full, rest = divmod(largest, physical)
    small = -(-rest // tail)
    if small * tail >= physical:
        return (physical,) * (full + 1)
    return (physical,) * full + (tail,) * small


def assign(
    step: int,
    sample: Int64[np.ndarray, " n"],
    *,
    assignment: Literal["balanced", "shard"],
    dataset_size: int,
    host_of_device: Sequence[int],
    physical: int,
    tail: int,
) -> Assignment:
    """Assign the sampled examples to devices.

    `balanced`: device d takes the d-th equal slice of the sorted sample. `shard`: each host takes what
    was sampled from its own contiguous shard, split evenly over its devices, for data that is
    local to a host. Both process exactly `sample`, each example once.
    """
    devices = len(host_of_device)
    if assignment == "balanced":
        slices = _split(0, len(sample), devices)
    else:
        hosts = max(host_of_device) + 1
        cuts = np.searchsorted(sample, shard_bounds(dataset_size, hosts))
        by_host = [iter(_split(int(cuts[h]), int(cuts[h + 1]), list(host_of_device).count(h))) for h in range(hosts)]
        slices = [next(by_host[host]) for host in host_of_device]
    largest = max(end - begin for begin, end in slices)
    return Assignment(step, sample, tuple(slices), microbatch_sizes(largest, physical, tail))


def _split(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    edges = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))
