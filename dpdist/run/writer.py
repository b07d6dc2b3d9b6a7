"""Everything that process 0 writes into a run directory while the run goes on, and a null object for the others.

The loop in `dpdist.trainer` keeps the order that the guarantee rests on: it reserves a step before it takes it,
publishes what was measured only once the checkpoint is committed, and checks the lease before each reserve, each save
and the summary.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, NoReturn

import jax
from jaxtyping import Array

from dpdist.cluster.lease import Lease
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.ledger import Ledger
from dpdist.mechanism.sampling import Assignment
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.progress import say
from dpdist.run.recorder import Recorder
from dpdist.run.resume import Start
from dpdist.run.summary import Outcome, closing_line, summarise

logger = logging.getLogger(__name__)


class RunWriter:
    """The lease, the ledger, the metrics and the summary of a run, on process 0.

    `begin` and `start_recording` come first, in this order; the other methods need them.
    """

    def __init__(self, config: Config, run: RunDirectory, world: World, lease: Lease, ledger: Ledger) -> None:
        self.ledger = ledger
        self._config, self._run, self._world, self._lease = config, run, world, lease
        self._recorder: Recorder

    def begin(self, start: Start, checkpoints: Checkpoints) -> None:
        """Write down how this part of the run begins, before its first step, and set later checkpoints aside.

        Raises:
            LeaseLostError: another job has taken over the run.
            LedgerError: the ledger cannot be extended.
        """
        self._lease.check()
        self.ledger.begin(start.plan)  # first: a config without its incarnation would hide what changed
        if start.fresh and start.plan.reasons:
            say(
                f"dpdist: incarnation {start.plan.incarnation} begins at step {start.plan.start}, with fresh samples "
                f"and noise, since {'; '.join(start.plan.reasons)}. What was taken before stays charged."
            )
        if start.step is not None:
            checkpoints.synchronise(start.step)
            self.ledger.record_saved(start.step)  # a crash may have come in between
        self._run.begin(self._config)
        for step in checkpoints.steps():
            if start.step is None or step > start.step:
                checkpoints.set_aside(step, self._run.abandoned)

    def start_recording(self, start: Start) -> None:
        """Open the metrics; throughput is measured from here on."""
        from dpdist.run.plan import spending  # the accountant takes a second to import, and one process needs it

        self._recorder = Recorder(self._config, start, self._run, spending(self.ledger))

    def check_lease(self) -> None:
        """Make sure that no other job has taken over, before what it must not see is written.

        Raises:
            LeaseLostError: one has.
        """
        self._lease.check()

    def reserve(self, start: int, stop: int) -> None:
        """Charge steps [start, stop), durably, before any of them runs.

        Raises:
            LeaseLostError: another job has taken over the run.
            BudgetExhaustedError: the plan does not hold these steps.
            LedgerError: the ledger cannot be extended.
        """
        self._lease.check()
        self.ledger.reserve(start, stop)

    def charged_steps(self) -> int:
        """The number of (incarnation, step) pairs charged so far."""
        return self.ledger.charged_steps()

    def step_done(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        """Step `step` was dispatched: wait for the step before it, and record that."""
        self._recorder.step_done(step, assignment, diagnostics, draw)

    def straggler_reports(self, reports: list[dict[str, Any]]) -> None:
        """Record, under `private/`, which ranks the others waited for."""
        self._recorder.straggler_reports(reports)

    def flush(self) -> None:
        """Record the newest step too, on the disk."""
        self._recorder.flush()

    def evaluated(self, step: int, accuracy: float) -> None:
        """Hold the accuracy of the parameters after `step` steps until `publish`."""
        self._recorder.evaluated(step, accuracy)

    def has_accuracy(self, step: int) -> bool:
        """Whether an earlier part of the run has published the accuracy after `step` steps."""
        return self._recorder.has_accuracy(step)

    def publish_if_committed(self, step: int, checkpoints: Checkpoints) -> None:
        """`publish` the save of `step` as soon as it is committed, once."""
        if step > self.ledger.saved_step and checkpoints.committed(step):
            self.publish(step)

    def publish(self, step: int) -> None:
        """Show what was measured up to `step`, whose checkpoint is committed; first note that in the ledger."""
        self.ledger.record_saved(step)
        self._recorder.committed(step)

    def summary(self, *, step: int, ended: bool, params_sha256: str | None, finite: bool) -> dict[str, Any]:
        """The content of `summary.json` after `step` steps; see `Outcome`."""
        plan = self.ledger.plans[-1]
        outcome = Outcome(
            step=step,
            ended=ended,
            params_sha256=params_sha256,
            finite=finite,
            accuracy=self._recorder.accuracy,
            epsilon_spent=self._recorder.epsilon(plan.start + self.ledger.charged_to(plan.incarnation)),
            charged_steps=self.ledger.charged_steps(),
            examples_per_second=self._recorder.examples_per_second(),
            processes=self._world.num_processes,
            devices=self._world.device_count,
        )
        return summarise(self._config, plan, outcome)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and the plots, and say how the run ended."""
        self._run.write_summary(summary)
        if self._config.run.plots:
            plot_if_possible(self._run)
        say(closing_line(summary, self._run.root))

    def write_failure(self, step: int) -> None:
        """Write a summary that says `failed`, after `step` steps."""
        failed = self.summary(step=step, ended=False, params_sha256=None, finite=True)
        with contextlib.suppress(OSError):  # a full disk must not hide what it has led to
            self._run.write_summary(failed)

    def stop_recording(self) -> None:
        """Close the metrics and give the terminal back. Repeated calls do nothing."""
        self._recorder.close()

    def release(self) -> None:
        """Let the next job start at once."""
        self._lease.release()


class SilentWriter:
    """What the other processes have in place of a `RunWriter`: it writes nothing, and keeps the same pace.

    What process 0 alone answers is asked through `agreement.decide`, and never of this one.
    """

    def __init__(self) -> None:
        self._latest: Array | None = None

    @property
    def ledger(self) -> Ledger:
        _only_process_0()

    def begin(self, start: Start, checkpoints: Checkpoints) -> None:
        _only_process_0()

    def has_accuracy(self, step: int) -> bool:
        _only_process_0()

    def summary(self, *, step: int, ended: bool, params_sha256: str | None, finite: bool) -> dict[str, Any]:
        _only_process_0()

    def step_done(self, step: int, assignment: Assignment, diagnostics: Array, draw: Array | None) -> None:
        """Wait for the step before `step`, as `Recorder.step_done` does."""
        previous, self._latest = self._latest, diagnostics
        jax.block_until_ready(previous)

    def flush(self) -> None:
        """Wait for the newest step."""
        jax.block_until_ready(self._latest)
        self._latest = None

    def start_recording(self, start: Start) -> None: ...

    def check_lease(self) -> None: ...

    def reserve(self, start: int, stop: int) -> None: ...

    def charged_steps(self) -> int:
        """0: process 0 alone writes the JSON part of a checkpoint."""
        return 0

    def straggler_reports(self, reports: list[dict[str, Any]]) -> None: ...

    def evaluated(self, step: int, accuracy: float) -> None: ...

    def publish_if_committed(self, step: int, checkpoints: Checkpoints) -> None: ...

    def publish(self, step: int) -> None: ...

    def write_summary(self, summary: dict[str, Any]) -> None: ...

    def write_failure(self, step: int) -> None: ...

    def stop_recording(self) -> None: ...

    def release(self) -> None: ...


def plot_if_possible(run: RunDirectory) -> None:
    """Plots are a convenience: a run must not fail for want of a font or of space for them."""
    try:
        from dpdist.run.plots import plot_run  # matplotlib, for process 0 alone

        plot_run(run.root)
    except Exception:
        logger.exception("the plots could not be written")


def _only_process_0() -> NoReturn:
    raise RuntimeError("only process 0 can answer this: ask through agreement.decide")
