"""Timing of several arms side by side: in rounds, so that a slow minute of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Clock = Callable[[], float]


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
    after_round: Callable[[int], None] = lambda number: None,
) -> dict[str, list[float]]:
    """Seconds a call of every run, by round.

    In a round each has one turn, and the next round begins with the next of them. A turn is one call that is not
    timed, so that caches and the threads of another framework settle, and then as many as take `seconds`, at least one.
    """
    names, times = list(runs), {name: list[float]() for name in runs}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_turn(runs[name], seconds, clock))
        after_round(number)
    return times


def _turn(run: Callable[[], object], seconds: float, clock: Clock) -> float:
    run()
    calls, began = 0, clock()
    while True:
        run()
        calls += 1
        spent = clock() - began
        if spent >= seconds:
            return spent / calls


def ratios(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, over rounds, of the ratio to the baseline of the same round.

    The median of ratios, not the ratio of medians: both times of a ratio were taken in the same half minute.
    """
    low, median, high = np.percentile(np.divide(times, baseline), [25, 50, 75])
    return {"ratio": float(median), "ratio_p25": float(low), "ratio_p75": float(high)}
