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


def in_random_order(sample: Int64[np.ndarray, " n"], key: UInt64[np.ndarray, " 2"]) -> Int64[np.ndarray, " n"]:
    """The sample in an order that `key` draws, each of the n! equally likely, whatever the sample holds.

    Which examples share a product decides how its float32 sum is rounded. In sorted order, one example more would move
    every later one to another product. In random order it need not: whoever takes an example out and puts the last one
    into its place has an order that is as likely as any of the smaller sample, and at most two products differ. So the
    two laws of the step are mixtures, with equal weights, of pairs that differ in at most two products.
    """
    return sample[np.argsort(words(key, 0, len(sample)), kind="stable")]


def shard_bounds(dataset_size: int, hosts: int) -> list[int]:
    """The hosts + 1 boundaries of equal contiguous shards of the data, one a host."""
    return [dataset_size * host // hosts for host in range(hosts + 1)]


@dataclass(frozen=True)
class Assignment:
    """Who processes which example of one step, and in which products.

    Device d processes the examples `by_device[d]` in microbatches of `physical`. What is left in the end is one more,
    of `tail` rows where they suffice and of `physical` otherwise, filled up with padding. So the sizes depend on the
    number of examples alone, and taking the last example away changes its own microbatch alone.
    """

    step: int
    #: The whole Poisson sample, sorted.
    sample: np.ndarray
    by_device: tuple[np.ndarray, ...]
    physical: int
    tail: int

    @property
    def rounds(self) -> int:
        """The largest number of microbatches on a device."""
        return max(-(-len(own) // self.physical) for own in self.by_device)

    def sizes(self, device: int) -> tuple[int, ...]:
        """The sizes of one device's microbatches."""
        return microbatch_sizes(len(self.by_device[device]), self.physical, self.tail)

    def rows(self, device: int, number: int) -> Int64[np.ndarray, " p"]:
        """Example indices of one microbatch on one device, in index order, which is faster to read; -1 is padding.

        Empty where the device has fewer microbatches than that.
        """
        own = np.sort(self.by_device[device][number * self.physical : (number + 1) * self.physical])
        size = sum(microbatch_sizes(len(own), self.physical, self.tail))
        return np.concatenate([own, np.full(size - len(own), -1, np.int64)])


def microbatch_sizes(examples: int, physical: int, tail: int) -> tuple[int, ...]:
    """The sizes of the microbatches that hold `examples`: full ones, and the smaller of both shapes for the rest."""
    full, rest = divmod(examples, physical)
    return (physical,) * full + ((tail if rest <= tail else physical,) if rest else ())


def assign(
    step: int,
    drawn: Int64[np.ndarray, " n"],
    *,
    assignment: Literal["chunks", "balanced", "shard"],
    dataset_size: int,
    host_of_device: Sequence[int],
    physical: int,
    tail: int,
) -> Assignment:
    """Assign the sampled examples to devices, in the order `drawn`, which `in_random_order` made.

    `chunks`: it is cut into chunks of `physical`, whatever the devices, and whole chunks go to devices in turn:
    which examples share a product is then the same on any topology. `balanced`: each device in turn takes an example.
    `shard`: each host takes what was sampled from its own contiguous shard, its devices in turn, for data that is local
    to a host. All process exactly the sample, each example once.
    """
    devices = len(host_of_device)
    if assignment == "chunks":
        chunk = np.arange(len(drawn)) // physical
        # The devices take turns in being first, who has the most to do: at random, but the same for every sample.
        first = int(words(np.array([step, 0], np.uint64), 0, 1)[0] % np.uint64(devices))
        by_device = [drawn[chunk % devices == (device - first) % devices] for device in range(devices)]
    elif assignment == "balanced":
        by_device = [drawn[device::devices] for device in range(devices)]
    else:
        bounds = shard_bounds(dataset_size, max(host_of_device) + 1)
        by_device = []
        for device, host in enumerate(host_of_device):
            own = drawn[(drawn >= bounds[host]) & (drawn < bounds[host + 1])]
            before = list(host_of_device[:device]).count(host)
            by_device.append(own[before :: list(host_of_device).count(host)])
    return Assignment(step, np.sort(drawn), tuple(by_device), physical, tail)
