"""Arms of `bench clipping` that take a given time on a clock of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dpdist_launch.measure.bench.program import Arm, Program
from dpdist_launch.measure.bench.tasks import Problem


class Clock:
    """Time passes only where something is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, costs: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.now += next(costs)

        return run


def forever(*costs: float) -> Iterator[float]:
    while True:
        yield from costs


def fake(name: str, cost: float, clock: Clock, *, framework: str = "jax", sums: float = 1.0) -> Arm:
    """An arm that takes `cost` seconds and whose only sum is `sums`."""

    def prepare(problem: Problem) -> Program:
        if cost < 0:
            raise ValueError("cannot\nat all")
        return Program(run=clock.run(forever(cost)), read=lambda result: {"w": np.array([sums])})

    return Arm(name=name, framework=framework, private="sgd" not in name, prepare=prepare)
