"""Everything that process 0 writes into a run directory while the run goes on, and a null object for the others.

The loop in `dpdist.trainer` keeps the order that the guarantee rests on: it reserves a step before it takes it,
publishes what was measured only once the checkpoint is committed, and checks the lease before each reserve, each save
and the summary. What is told of a run beside its results, its events and what the time went into, ends no run: where it
cannot be written, there is a warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import jax
from jaxtyping import Array

from dpdist.cluster.lease import Lease, LeaseLostError
from dpdist.cluster.preflight import BadNodeError
from dpdist.cluster.rendezvous import MissingRanksError
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.mechanism.sampling import Assignment
from dpdist.run import events, notices
from dpdist.run.checkpoint import Checkpoints, SaveFailedError
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist.run.goodput import Goodput
from dpdist.run.metrics import Stream
from dpdist.run.progress import say
from dpdist.run.ranks import Ranks
from dpdist.run.recorder import NothingToLearnError, Recorder
from dpdist.run.refusal import FormerFiles
from dpdist.run.resume import Start
from dpdist.run.summary import TRIAL, Outcome, closing_line, going_on, summarise

logger = logging.getLogger(__name__)

#: Errors whose texts are dpdist's own, about files and processes.
QUOTES_NO_DATA = (LedgerError, SaveFailedError, LeaseLostError, BadNodeError, MissingRanksError, NothingToLearnError)


class RunWriter:
    """The lease, the ledger, the metrics and the summary of a run, on process 0.

    `begin` and `start_recording` come first, in this order; but for `phase`, `failed` and `release`, the other methods
    need them.

    Args:
        nodes: the node of each rank.
        began: when this part of the run began, by `time.monotonic`.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        world: World,
        lease: Lease,
        ledger: Ledger,
        *,
        began: float,
    ) -> None:
        self.ledger = ledger
        self._config, self._run, self._world, self._lease = config, run, world, lease
        self._began = began
        self._step = ledger.saved_step
        self._told_end = False
        self._former = FormerFiles(run, ledger)
        self._recorder: Recorder
        self._speed: Callable[[float | None], dict[str, float | None]]
        self._goodput = Goodput(
            run.goodput, nodes=len(set(world.nodes)), began=began, last_sign=_last_sign_of_predecessor(run, lease)
        )
        self._ranks = Ranks.of_this_job(world.nodes, os.environ)
        with warning_of(run.ranks):
            write_atomically(run.ranks, self._ranks.to_json(), mode=0o600)
        if (queued := os.environ.get("DPDIST_QUEUED", "")).isdecimal():  # of the batch script
            self._goodput.queued(float(queued))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The time within the block goes into this phase of `dpdist.run.goodput`."""
        return self._goodput.phase(name)

    def begin(self, start: Start, checkpoints: Checkpoints) -> None:
        """Write down how this part of the run begins, before its first step, and set later checkpoints aside.

        Raises:
            LeaseLostError: another job has taken over the run.
            LedgerError: the ledger cannot be extended.
        """
        self._lease.check()
        self._former.forget()
        self.ledger.begin(start.plan)  # first: a config without its incarnation would hide what changed
        if start.fresh and (reasons := [reason for reason in start.plan.reasons if reason != TRIAL]):
            say(
                f"dpdist: incarnation {start.plan.incarnation} begins at step {start.plan.start}, with fresh samples "
                f"and noise, since {'; '.join(reasons)}. What was taken before stays charged."
            )
        if start.step is not None:
            checkpoints.synchronise(start.step)
            self.ledger.record_saved(start.step)  # a crash may have come in between
        self._run.begin(self._config)
        for step in checkpoints.steps():
            if start.step is None or step > start.step:
                checkpoints.set_aside(step, self._run.abandoned)
        self._step = start.step or 0
        self._goodput.resumed(self._step)
        before = events.read(self._run.events)
        machines = {"nodes": len(set(self._ranks.nodes)), "processes": self._world.num_processes}
        here = {"step": self._step, "steps": start.plan.steps} | machines
        if start.step is None and not before:
            self._tell("start", **here)
        else:
            number = events.restarts(before) + 1
            ended = events.how_it_ended(before)
            say(going_on(self._step, start.plan.steps, ended, taken=start.step is not None))
            self._tell("resume", **here, restarts=number, after=ended)

    def start_recording(self, start: Start, speed: Callable[[float | None], dict[str, float | None]]) -> None:
        """Open the metrics; throughput is measured from here on.

        Args:
            speed: what the summary says of a device at so many examples a second of all together.
        """
        self._speed = speed
        from dpdist.run.plan import spending  # the accountant takes a second to import, and one process needs it

        until_here = time.monotonic() - self._began
        self._recorder = Recorder(
            self._config, start, self._run, spending(self.ledger), seconds_to_first_step=until_here
        )
        self._goodput.enter("training")

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

    def waited(self, share: float) -> None:
        """The share of a step that ranks wait for the slowest, as sampled so far; called after every step."""
        self._goodput.tick(share)

    def saving(self, step: int) -> None:
        """The state after `step` steps is handed to the checkpoints."""
        self._goodput.saving(step)

    def looked(self, step: int, incarnation: int, found: dict[str, Any]) -> None:
        """Note, under `private/`, what `program.probe` has found after `step` steps."""
        with warning_of(self._run.probe), contextlib.closing(Stream(self._run.probe, mode=0o600)) as stream:
            stream.write({"step": step, "incarnation": incarnation} | found)

    def straggler_reports(self, reports: list[dict[str, Any]]) -> None:
        """Record, under `private/`, which ranks the others waited for."""
        self._recorder.straggler_reports(reports)

    def flush(self) -> None:
        """Record the newest step too, on the disk."""
        self._recorder.flush()

    def evaluated(self, step: int, metrics: dict[str, float | None]) -> None:
        """Hold the test metrics of the parameters after `step` steps until `publish`."""
        self._recorder.evaluated(step, metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier part of the run has published the test metrics after `step` steps."""
        return self._recorder.has_evaluation(step)

    def publish_if_committed(self, step: int, checkpoints: Checkpoints) -> None:
        """`publish` the save of `step` as soon as it is committed, once."""
        if step > self.ledger.saved_step and checkpoints.committed(step):
            self.publish(step)

    def publish(self, step: int) -> None:
        """Show what was measured up to `step`, whose checkpoint is committed; first note that in the ledger."""
        self.ledger.record_saved(step)
        self._recorder.committed(step)
        self._goodput.write()

    def summary(self, *, step: int, ended: bool, params_sha256: str | None, finite: bool) -> dict[str, Any]:
        """The content of `summary.json` after `step` steps; see `Outcome`."""
        plan = self.ledger.plans[-1]
        rate = self._recorder.examples_per_second()
        outcome = Outcome(
            step=step,
            ended=ended,
            params_sha256=params_sha256,
            finite=finite,
            metrics=self._recorder.metrics,
            epsilon_spent=self._recorder.epsilon(plan.start + self.ledger.charged_to(plan.incarnation)),
            charged_steps=self.ledger.charged_steps(),
            examples_per_second=rate,
            speed=self._speed(rate),
            processes=self._world.num_processes,
            devices=self._world.device_count,
            seconds_to_first_step=self._recorder.seconds_to_first_step,
            goodput=self._goodput.public(),
        )
        return summarise(self._config, plan, outcome)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and the plots, and say how the run ended."""
        self._run.write_summary(summary)
        if self._config.run.plots:
            plot_if_possible(self._run)
        say(closing_line(summary, self._run.root))
        step, status = summary["step"], summary["status"]
        if status == "preempted":
            say(f"dpdist: step {step} is saved: the same command again goes on from there")
            self._tell("preempted", step=step, saved=True)
        else:
            self._tell("finished", step=step, status=status)

    def write_failure(self, step: int, error: BaseException) -> None:
        """Write a summary that says `failed`, after `step` steps, and tell why; nothing if the run is another job's."""
        if not self._is_ours():
            return
        failed = self.summary(step=step, ended=False, params_sha256=None, finite=True)
        with contextlib.suppress(OSError):  # a full disk must not hide what it has led to
            self._run.write_summary(failed)
        self._step = step
        self.failed(error)

    def failed(self, error: BaseException | None) -> None:
        """Tell that this part of the run ends with `error`, if it has not been told; None is no failure."""
        if error is None or self._told_end or not self._is_ours():
            return
        if not self._former.restore(error):
            self._tell("failed", step=self._step, cause=events.public_cause(error, ours=QUOTES_NO_DATA))

    def _is_ours(self) -> bool:
        try:
            self._lease.check()
        except LeaseLostError:
            return False
        return True

    def stop_recording(self) -> None:
        """Close the metrics and give the terminal back. Repeated calls do nothing."""
        self._recorder.close()

    def release(self) -> None:
        """Let the next job start at once."""
        with contextlib.suppress(LeaseLostError):  # then the file is another job's
            self._lease.check()
            if not self._former.restored:
                self._goodput.write(closed=True)
        self._lease.release()

    def _tell(self, kind: str, **fields: Any) -> None:
        """Write an event, and call `run.on_event` for it if it is an occasion."""
        self._told_end = kind in events.ENDS
        event = events.event_of(kind, **fields)
        with warning_of(self._run.events):
            events.append(self._run.events, event)
        on_event = self._config.run.on_event
        if on_event is None or not notices.is_occasion(event):
            return
        call = threading.Thread(
            target=notices.notify, args=(on_event, event, self._run.root, self._run.logs / "on_event.log"), daemon=True
        )
        call.start()
        if self._told_end:  # while the run goes on, nobody waits
            # The others wait for process 0 meanwhile, and they may have been given less time than a hook.
            call.join(min(notices.BOUND + 1, self._world.timeout / 2))


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

    def has_evaluation(self, step: int) -> bool:
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

    def start_recording(self, start: Start, speed: Callable[[float | None], dict[str, float | None]]) -> None: ...

    def looked(self, step: int, incarnation: int, found: dict[str, Any]) -> None:
        _only_process_0()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Process 0's clock counts for all."""
        return nullcontext()

    def waited(self, share: float) -> None: ...

    def saving(self, step: int) -> None: ...

    def check_lease(self) -> None: ...

    def reserve(self, start: int, stop: int) -> None: ...

    def charged_steps(self) -> int:
        """0: process 0 alone writes the JSON part of a checkpoint."""
        return 0

    def straggler_reports(self, reports: list[dict[str, Any]]) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float | None]) -> None: ...

    def publish_if_committed(self, step: int, checkpoints: Checkpoints) -> None: ...

    def publish(self, step: int) -> None: ...

    def write_summary(self, summary: dict[str, Any]) -> None: ...

    def write_failure(self, step: int, error: BaseException) -> None: ...

    def failed(self, error: BaseException | None) -> None: ...

    def stop_recording(self) -> None: ...

    def release(self) -> None: ...


def _last_sign_of_predecessor(run: RunDirectory, lease: Lease) -> float | None:
    """When a job that died last wrote a heartbeat or a step, by the file system's clock; None if none has died."""
    heartbeat = lease.last_sign_of_predecessor()
    if heartbeat is None:
        return None
    try:
        return max(heartbeat, run.diagnostics.stat().st_mtime)
    except OSError:
        return heartbeat


@contextlib.contextmanager
def warning_of(path: Path) -> Iterator[None]:
    """Turn an error of the file system in the block into a warning that names `path`."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written (%s)", path, error.strerror)


def plot_if_possible(run: RunDirectory) -> None:
    """Plots are a convenience: a run must not fail for want of a font or of space for them."""
    try:
        from dpdist.run.plots import plot_run  # matplotlib, for process 0 alone

        plot_run(run.root)
    except Exception:
        logger.exception("the plots could not be written")


def _only_process_0() -> NoReturn:
    raise RuntimeError("only process 0 can answer this: ask through agreement.decide")
