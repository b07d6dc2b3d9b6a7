"""What a run writes about itself while it runs: public metrics, progress, and diagnostics under `private/`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import DIAGNOSTICS
from dpdist.run.directory import RunDirectory
from dpdist.run.metrics import Publisher, Stream, read
from dpdist.run.progress import ProgressLine
from dpdist.run.resume import Start


class Recorder:
    """Observes the steps of one process; only process 0 writes.

    It stays one step behind: waiting for the step before the newest bounds how far the host runs ahead of
    the devices, without leaving them idle.
    """

    def __init__(
        self, config: Config, start: Start, run: RunDirectory, world: World, spending: Callable[[int], float] | None
    ) -> None:
        plan = start.plan
        self._config, self._plan, self._world, self._spending = config, plan, world, spending
        self._start = start.step or 0
        self._latest: tuple[int, Assignment, Array, Array | None] | None = None
        self._began = self._logged = time.perf_counter()
        self._logged_step = self._done = self._start
        self.accuracy: float | None = None
        if world.is_main:
            self._metrics = run.metrics
            self._public = Publisher(Stream(run.metrics))
            self._private = Stream(run.diagnostics, mode=0o600)
            self._stragglers = Stream(run.stragglers, mode=0o600)
            if start.fresh and plan.incarnation > 0:
                self._public.write({"step": self._start, "incarnation": plan.incarnation})
            self._progress = ProgressLine(
                steps=plan.steps,
                start=self._start,
                budget=plan.target_epsilon or plan.epsilon,
                style=config.run.progress,
            )

    def step_done(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        """Step `step` was dispatched; record the one before it, which has finished or is waited for."""
        previous, self._latest = self._latest, (step, assignment, diagnostics, draw)
        if previous is not None:
            self._record(*previous)

    def waited_for(self, stragglers: list[dict[str, Any]]) -> None:
        """Which ranks the others waited for; under `private/`, since step times depend on the sample. For process 0."""
        for report in stragglers:
            self._stragglers.write(report)

    def flush(self) -> None:
        """Record the newest step too, on the disk: a run that resumes from its checkpoint will not take it again."""
        if self._latest is not None:
            self._record(*self._latest)
            self._latest = None
        if self._world.is_main:
            self._private.synchronise()
            self._public.synchronise()

    def evaluated(self, step: int, accuracy: float) -> None:
        """The parameters after `step` steps have this test accuracy; shown once their checkpoint is committed."""
        self.accuracy = accuracy
        if self._world.is_main:
            self._public.hold({"step": step, "accuracy": accuracy, "epsilon": self.epsilon(step)})

    def has_accuracy(self, step: int) -> bool:
        """Whether an earlier part of the run has shown the accuracy after `step` steps. For process 0.

        Never of the last step, whose accuracy the summary is still to state.
        """
        shown = read(self._metrics)
        return step != self._plan.steps and any(r["step"] == step and "accuracy" in r for r in shown)

    def committed(self, step: int) -> None:
        """The checkpoint of `step` is on disk: what was measured up to it may be shown."""
        if not self._world.is_main:
            return
        for record in self._public.release(step):
            self._progress.show_accuracy(record["accuracy"])

    def epsilon(self, step: int) -> float | None:
        """Upper bound on what is spent once the run is at `step`, or None without privacy. For process 0."""
        return None if self._spending is None else self._spending(step - self._plan.start)

    def examples_per_second(self) -> float:
        """B * steps / time since this process began its first step: a public number."""
        return self._rate(self._done - self._start, time.perf_counter() - self._began)

    def close(self) -> None:
        """Give the terminal back."""
        if self._world.is_main:
            self._progress.close()
            self._private.close()
            self._stragglers.close()
            self._public.close()

    def _rate(self, steps: int, seconds: float) -> float:
        return self._plan.expected_batch_size * steps / max(seconds, 1e-9)

    def _record(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        jax.block_until_ready(diagnostics)
        self._done = step + 1
        if not self._world.is_main:
            return
        values = dict(zip(DIAGNOSTICS, np.asarray(diagnostics).tolist(), strict=True))
        record: dict[str, Any] = {"step": step, "incarnation": self._plan.incarnation}
        record |= {"microbatches": len(assignment.microbatches)} | values
        if self._config.training.record_digests:
            record["sample_sha256"] = hashlib.sha256(assignment.sample.astype("<i8").tobytes()).hexdigest()
            if draw is not None:
                record["noise_sha256"] = hashlib.sha256(np.asarray(draw).astype("<f4").tobytes()).hexdigest()
        self._private.write(record)
        if self._done % self._config.run.log_every == 0 or self._done == self._plan.steps:
            now = time.perf_counter()
            rate = self._rate(self._done - self._logged_step, now - self._logged)
            self._logged, self._logged_step = now, self._done
            spent = self.epsilon(self._done)
            self._public.write(
                {"step": self._done, "epsilon": spent, "examples_per_second": rate, "seconds": now - self._began}
            )
            self._progress.update(self._done, spent, rate)
