"""Time several arms in rounds, so that a slow minute of the machine affects all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Clock = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """Seconds per call, for each round."""

    #: By the clock on the wall.
    wall: list[float] = field(default_factory=list)
    #: Of processor time, all of the process's threads together: what other processes take of the cores is not in it.
    processor: list[float] = field(default_factory=list)


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
    processor: Clock = time.process_time,
    until: float = math.inf,
    after_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Times]:
    """Return the seconds per call of every run, for each round.

    In a round each run has one turn; the next round starts with the next run. A turn is one call that is not timed, so
    that caches and another framework's threads settle, followed by timed calls until `seconds` have passed, at least
    one. No round but the first begins after `until` on the clock.
    """
    names, times = list(runs), {name: Times() for name in runs}
    for number in range(rounds):
        if number and clock() >= until:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, spent = _turn(runs[name], seconds, clock, processor)
            times[name].wall.append(wall)
            times[name].processor.append(spent)
        after_round(number)
    return times


def _turn(run: Callable[[], object], seconds: float, clock: Clock, processor: Clock) -> tuple[float, float]:
    run()
    calls, began, worked = 0, clock(), processor()
    while True:
        run()
        calls += 1
        spent = clock() - began
        if spent >= seconds:
            return spent / calls, (processor() - worked) / calls


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """Return the name of the smallest median."""
    return min(times, key=lambda name: float(np.median(times[name])))


def ratios(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return the median and quartiles, over rounds, of the ratio to the baseline's time in the same round.

    We take the median of ratios, not the ratio of medians, because both times of a ratio were measured within half a
    minute of each other.
    """
    low, median, high = np.percentile(np.divide(times, baseline), [25, 50, 75])
    return {"ratio": float(median), "ratio_p25": float(low), "ratio_p75": float(high)}
