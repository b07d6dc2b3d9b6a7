"""What process 0 records of a run: public metrics, progress, and diagnostics under `private/`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpdist.config import Config
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import DIAGNOSTICS
from dpdist.run.directory import RunDirectory
from dpdist.run.metrics import Publisher, Stream, is_evaluation, metrics_of, read
from dpdist.run.private_log import record_exception
from dpdist.run.progress import ProgressLine
from dpdist.run.resume import Start

#: So many steps in a row, and at least so many examples in them, without a single finite gradient end the run.
_STEPS_WITHOUT, _EXAMPLES_WITHOUT = 3, 16
#: Steps whose time is shown together, or more: a single step's tells the size of its sample.
_TIMED_TOGETHER = 10


class NothingToLearnError(RuntimeError):
    """No gradient of several steps was finite, so that only noise moves the parameters."""


class Recorder:
    """Records the steps of a run, on process 0.

    It stays one step behind: waiting for the step before the newest bounds how far the host runs ahead of
    the devices, without leaving them idle.

    Args:
        spending: epsilon after n steps of the current incarnation; None without privacy.
        seconds_to_first_step: from the start of this part of the run until its first step could begin. That step is not
            in it: its duration would tell the size of its sample.
    """

    def __init__(
        self,
        config: Config,
        start: Start,
        run: RunDirectory,
        spending: Callable[[int], float] | None,
        *,
        seconds_to_first_step: float,
    ) -> None:
        plan, terms = start.plan, start.plan.privacy
        self._config, self._plan, self._spending = config, plan, spending
        self._start = start.step or 0
        self._latest: tuple[int, Assignment, Array, Array | None] | None = None
        self._started = self._logged = time.perf_counter()
        self._logged_step = self._done = self._start
        self.seconds_to_first_step = seconds_to_first_step
        #: Of the last stretch of steps that were timed together; nothing before the first has ended.
        self._timed: dict[str, float | None] = {"examples_per_second": None, "seconds": None}
        self._untold: dict[str, Any] = {"seconds_to_first_step": seconds_to_first_step}
        #: The last that was shown: of a committed checkpoint, so that no failed run can take it back.
        self.metrics: dict[str, float | None] = {}
        #: Steps in a row without a finite gradient, and the examples in them.
        self._without = (0, 0)
        self._metrics = run.metrics
        self._public = Publisher(Stream(run.metrics))
        self._private = Stream(run.diagnostics, mode=0o600)
        self._stragglers = Stream(run.stragglers, mode=0o600)
        if start.fresh and plan.incarnation > 0:
            self._public.write({"step": self._start, "incarnation": plan.incarnation})
        self._progress = ProgressLine(
            steps=plan.steps,
            start=self._start,
            budget=None if terms is None else terms.target_epsilon or terms.epsilon,
            style=config.run.progress,
        )

    def step_done(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        """Step `step` was dispatched: wait for the step before it, and record that."""
        previous, self._latest = self._latest, (step, assignment, diagnostics, draw)
        if previous is not None:
            self._record(*previous)

    def straggler_reports(self, reports: list[dict[str, Any]]) -> None:
        """Which ranks the others waited for; under `private/`, since step times depend on the sample."""
        for report in reports:
            self._stragglers.write(report)

    def flush(self) -> None:
        """Record the newest step too, on the disk: a run that resumes from its checkpoint will not take it again."""
        if self._latest is not None:
            self._record(*self._latest)
            self._latest = None
        self._private.synchronise()
        self._public.synchronise()

    def evaluated(self, step: int, metrics: dict[str, float | None]) -> None:
        """Hold the test metrics of the parameters after `step` steps until their checkpoint is committed."""
        self._public.hold({"step": step, **metrics, "epsilon": self.epsilon(step)})

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier part of the run has shown the test metrics after `step` steps.

        Never those of the last step, which the summary is still to state.
        """
        shown = read(self._metrics)
        return step != self._plan.steps and any(r["step"] == step and is_evaluation(r) for r in shown)

    def committed(self, step: int) -> None:
        """Show what was measured up to `step`, whose checkpoint is committed."""
        for record in self._public.release(step):
            self.metrics = metrics_of(record)
            self._progress.show_metrics(self.metrics)

    def epsilon(self, step: int) -> float | None:
        """Upper bound on epsilon once the run is at `step`; None without privacy."""
        return None if self._spending is None else self._spending(step - self._plan.start)

    def examples_per_second(self) -> float | None:
        """B * steps / time from this process's first step to the last whose time was shown; None before there is one.

        Not to the newest: with the times that were shown, that would tell how long the few steps after these took.
        """
        steps = self._logged_step - self._start
        return None if steps == 0 else self._rate(steps, self._logged - self._started)

    def close(self) -> None:
        """Close the files and give the terminal back."""
        self._progress.close()
        self._private.close()
        self._stragglers.close()
        self._public.close()

    def _rate(self, steps: int, seconds: float) -> float:
        return self._plan.expected_batch_size * steps / max(seconds, 1e-9)

    def _record(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        jax.block_until_ready(diagnostics)
        self._done = step + 1
        values = dict(zip(DIAGNOSTICS, np.asarray(diagnostics).tolist(), strict=True))
        record: dict[str, Any] = {"step": step, "incarnation": self._plan.incarnation}
        record |= {"microbatches": assignment.rounds} | values
        if self._config.training.record_digests:
            record["sample_sha256"] = hashlib.sha256(assignment.sample.astype("<i8").tobytes()).hexdigest()
            if draw is not None:
                record["noise_sha256"] = hashlib.sha256(np.asarray(draw).astype("<i8").tobytes()).hexdigest()
        self._private.write(record)
        self._require_something_to_learn(int(values["examples"]), int(values["not_finite"]))
        if self._done % self._config.run.log_every == 0 or self._done == self._plan.steps:
            self._log()

    def _require_something_to_learn(self, examples: int, not_finite: int) -> None:
        """Warn, in the private log, of a step without a finite gradient.

        Raises:
            NothingToLearnError: it is one of several in a row.
        """
        steps, seen = self._without
        if not_finite < examples:
            self._without = (0, 0)
        elif examples > 0:
            self._without = steps, seen = steps + 1, seen + examples
            record_exception(f"WARNING: no gradient of step {self._done} is finite; it trains on noise alone")
        if steps >= _STEPS_WITHOUT and seen >= _EXAMPLES_WITHOUT:
            raise NothingToLearnError(
                f"no gradient of the last {steps} steps up to step {self._done} was finite, so that nothing but noise "
                "moves the parameters: the run has diverged, or its loss has no value on this data; try a smaller "
                "optimizer.learning_rate, and see `dpdist diagnose`"
            )

    def _log(self) -> None:
        """Write the public numbers; those of time change only once enough steps are timed together."""
        steps = self._done - self._logged_step
        if steps >= _TIMED_TOGETHER:
            now = time.perf_counter()
            rate = self._rate(steps, now - self._logged)
            self._timed = {"examples_per_second": rate, "seconds": now - self._started}
            self._logged, self._logged_step = now, self._done
        spent = self.epsilon(self._done)
        self._public.write({"step": self._done, "epsilon": spent} | self._timed | self._untold)
        self._untold = {}
        passed, timed = self._timed["seconds"], self._logged_step - self._start
        each = None if passed is None else passed / timed
        self._progress.update(self._done, spent, self._timed["examples_per_second"], each)
