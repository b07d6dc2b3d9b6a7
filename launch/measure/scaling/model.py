"""Amdahl's law, fitted to measured throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean


def speed_up(nodes: float, smallest: float, parallel_fraction: float) -> float:
    """Return the speed-up of n = `nodes` over n0 = `smallest` nodes: 1 / ((1 - f) + f n0 / n) (Amdahl 1967)."""
    return 1 / ((1 - parallel_fraction) + parallel_fraction * smallest / nodes)


def parallel_fraction(throughput: Mapping[int, Sequence[float]]) -> float | None:
    """Fit f of Amdahl's law: the parallel share of a step's time on the smallest node count.

    Linear least squares on 1/S(n) = 1 - f (1 - n0/n) over all repeats of all node counts. n0 is the smallest node
    count, and speed-ups are relative to its mean throughput. The result is clipped to [0, 1].

    Args:
        throughput: examples per second of each repeat, by node count.

    Returns:
        f, or None for fewer than two node counts, which do not determine it.
    """
    if len(throughput) < 2:
        return None
    smallest = min(throughput)
    unit = mean(throughput[smallest])
    # x: the time that n nodes save at best; y: the time they did save; both as shares of the smallest count's time.
    pairs = [(1 - smallest / n, 1 - unit / rate) for n, rates in throughput.items() for rate in rates]
    fraction = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    return min(1.0, max(0.0, fraction))


def misfit(throughput: Mapping[int, Sequence[float]], fraction: float) -> float:
    """Return the root mean square of X(n) / X_fit(n) - 1 over all repeats of all node counts but the smallest.

    It is 0 for two node counts, through which the law always goes, unless f had to be clipped: where more nodes were
    slower, or faster than in proportion.
    """
    smallest = min(throughput)
    unit = mean(throughput[smallest])
    off = [
        rate / (unit * speed_up(n, smallest, fraction)) - 1
        for n, rates in throughput.items()
        for rate in rates
        if n > smallest
    ]
    return sqrt(mean(each * each for each in off))


def fraction_of_ideal(nodes: int, throughput: float, base: int, unit: float) -> float:
    """Return (X(n) / X(n0)) / (n / n0): 1 if n/n0 times the nodes give n/n0 times the throughput X of the base n0."""
    return (throughput / unit) / (nodes / base)
