"""A run from its config to its summary: `train` opens, plans and builds it, and `Trainer` takes its steps.

Follow one step from `Trainer.loop`: reserve it, take it, save, evaluate, publish.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Array

from dpdist import config as config_module
from dpdist.cluster.agreement import barrier, decide, require_same
from dpdist.cluster.capacity import require_disk, require_memory
from dpdist.cluster.join import join
from dpdist.cluster.lease import LeaseLostError
from dpdist.cluster.preemption import interruptible, preempted
from dpdist.cluster.preflight import require_network
from dpdist.cluster.straggler import Stragglers
from dpdist.cluster.watchdog import Watchdog
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.data import open_dataset
from dpdist.data.checks import fingerprints
from dpdist.data.datasets import with_given
from dpdist.data.feed import Feed
from dpdist.data.readers import read_in_processes
from dpdist.data.sources import Source
from dpdist.data.units import UnitSource
from dpdist.joint import charging
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.step import TrainState, accumulate_sample, noisy_update
from dpdist.models.families import settled
from dpdist.program.assignments import make_assigner, share_of_work
from dpdist.program.build import TrainingSetup, build_setup, open_model
from dpdist.program.flops import speed
from dpdist.program.look import look
from dpdist.program.probe import require_something_to_learn
from dpdist.program.update import placed
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.compiled import open_cache
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import all_finite, params_digest, step_inputs
from dpdist.run.opening import agree, agree_on_data, agree_on_start, begin, open_secret, open_writer
from dpdist.run.profiler import Profiler
from dpdist.run.progress import say
from dpdist.run.resume import ResumeRequest, Start, require_fits
from dpdist.run.writer import RunWriter, SilentWriter

logger = logging.getLogger(__name__)


def train(config: Config, *, dataset: Any = None, began: float | None = None) -> dict[str, Any]:
    """Train the run that `config` describes, or resume it where `config.run.dir` holds it already.

    Every process of the job calls this. Returns the summary, also written to `summary.json`; a run that has
    ended is not run again. Its `status` is `finished`, `budget_exhausted`, or `preempted` after SIGTERM or Ctrl-C.

    Args:
        dataset: the data to train and test on, instead of `config.data.source`: `(train, test)`, one set to be split by
            index, or a `dpdist.data.Dataset`, each set as `dpdist.open_dataset` takes it.
        began: since when this process works for the run, by `time.monotonic`; None is now.

    Raises:
        InputError: something given cannot be used; this call has taken no step.
    """
    began = time.monotonic() if began is None else began
    config = config if dataset is None else with_given(config)
    world = join(config.cluster)
    run = RunDirectory(Path(config.run.dir))
    agree(config, run, world)
    ended = decide(world, lambda: run.ended(config))
    if ended is not None:
        if world.is_main:
            say(f"{run.root} is {ended['status']} at step {ended['step']} of {ended['steps']}: nothing to do")
        return ended

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(interruptible(world))
        # Open: one job in the directory, one secret, one dataset.
        writer = open_writer(config, run, world, began=began)
        cleanup.callback(writer.release)
        cleanup.push(lambda kind, error, trace: writer.failed(error))
        compiling = open_cache(config, run, world)
        dataset = open_dataset(config, dataset)
        with compiling():
            opened = open_model(config, dataset)
        secret, secret_lost = open_secret(config, run, world)
        digests = fingerprints(dataset.train, dataset.test)
        tags = agree_on_data(secret, digests, world)
        stacks = run.logs / f"rank-{world.process_id}.stacks"
        watchdog = Watchdog(config.cluster.watchdog_timeout, stacks, world.membership.label)
        cleanup.callback(watchdog.stop)

        with watchdog.allow(config.cluster.initialization_timeout):
            readers = run.logs / f"reader-{world.process_id}"
            read = cleanup.enter_context(read_in_processes(dataset, config.data, digests, readers))

            # Plan: from which checkpoint, as which incarnation, with which constants; fixed before the first step.
            checkpoints = Checkpoints(
                run.checkpoints, keep=config.checkpoint.keep, timeout=config.cluster.shutdown_timeout
            )
            request = ResumeRequest(
                config=config,
                run=run,
                checkpoints=checkpoints,
                secret=secret,
                secret_lost=secret_lost,
                inputs=step_inputs(config, world, data=tags["training data"]),
                dataset_size=len(dataset.train),
                test_data=tags["test data"],
                test_digest=digests["test data"].hex(),
                tested=dataset.test is not None,
                coordinates=opened.coordinates,
            )
            start = agree_on_start(request, writer, world)
            decide(world, lambda: charging.require_room(config, run, writer.ledger, start.plan))

            # Build: compile every shape that can occur; place the state, new or restored, on the devices.
            with writer.phase("compile"):
                setup = build_setup(config, start.plan, opened, read, world, start.decisions, compiling)
            require_fits(start, setup.decisions()["leaves"])
            require_same({"initial parameters": params_digest(setup.initial.params)}, world)
            if setup.evaluator is not None:
                cleanup.callback(setup.evaluator.close)
            if config.cluster.preflight:
                _check_capacity(config, checkpoints, setup, world)
                _check_network(config, start, setup, world)
            state = placed(setup.initial, setup.step_programs.replicated)
            if start.step is not None:
                state = checkpoints.restore(start.step, state)
            with writer.phase("compile"):
                decide(world, lambda: _try_out(setup, state, start, dataset.train, writer))
            begin(run, writer, start, checkpoints, world, test_data=digests["test data"])
            decide(world, lambda: charging.charge(config, run, writer.ledger), timeout=2 * charging.PATIENCE)
            meta = {
                "config": config_module.to_dict(replace(config, model=settled(config.model))),
                "plan": start.plan.to_record(),
            }
            meta |= setup.decisions()
            if start.step is None:
                _save(0, state, meta, checkpoints, writer)
                checkpoints.wait()
            leaving = preempted(world)  # SIGTERM may have come while all of this was under way

        # Hand over.
        keys = Keys(secret, bytes.fromhex(start.plan.nonce))
        device = world.mesh.devices.flat[0]
        kind = {"devices": world.device_count, "device_kind": device.device_kind, "platform": world.platform}
        writer.start_recording(start, partial(speed, setup.flops, **kind))
        cleanup.callback(writer.stop_recording)
        assigner = make_assigner(config, start.plan, setup, keys, world)
        first, last = start.step or 0, start.plan.steps
        feed = Feed(read.train, assigner, world.mesh, data=config.data, start=first, stop=last)
        cleanup.callback(feed.close)
        trainer = Trainer(
            config=config,
            world=world,
            setup=setup,
            keys=keys,
            feed=feed,
            stragglers=Stragglers(world),
            watchdog=watchdog,
            checkpoints=checkpoints,
            writer=writer,
            profiler=Profiler(config.training.profile if world.is_main else None, run.profile),
            meta=meta,
            first=first,
            last=last,
            state=state,
            leaving=leaving,
        )
        return trainer.run()


def _check_capacity(config: Config, checkpoints: Checkpoints, setup: TrainingSetup, world: World) -> None:
    """Whether disk and memory hold the state: it is about to be placed, and each process reads or saves a copy."""
    state = setup.memory.state
    require_memory(world, each=state * (len(world.mesh.local_devices) if world.platform == "cpu" else 1))
    more = max(1, config.checkpoint.keep + 1 - len(checkpoints.steps()))  # an old one goes when a new one is whole
    for warning in require_disk(Path(config.run.dir), world, checkpoint=state, more=more):
        if world.is_main:
            say(f"preflight: {warning}")


def _check_network(config: Config, start: Start, setup: TrainingSetup, world: World) -> None:
    terms, least = start.plan.privacy, config.cluster.least_bandwidth
    found = require_network(
        setup.step_programs,
        world,
        noisy=terms is not None and terms.grid is not None,
        least_bandwidth=None if least is None else least * 1e9,
    )
    if found is not None and world.is_main:
        say(
            f"preflight: {world.num_processes} processes on {len(set(world.nodes))} nodes; all-reduce of "
            f"{found.bytes / 1e6:.3g} MB in {1e3 * found.seconds:.3g} ms, {found.bandwidth / 1e9:.2g} GB/s a device"
        )


def _try_out(
    setup: TrainingSetup, state: TrainState, start: Start, source: Source, writer: RunWriter | SilentWriter
) -> None:
    """Look at a few training examples before the first step, on process 0; what is found is private.

    Raises:
        InputError: the run is a new one, and none of them has a gradient; or one cannot be read.
    """
    found = look(setup, state, start.plan.privacy)
    if isinstance(source, UnitSource):
        found |= {"records_left_out": source.left_out}
    writer.looked(start.step or 0, start.plan.incarnation, found)
    if start.step is None:
        require_something_to_learn(found)


@dataclass(kw_only=True)
class Trainer:
    """Takes the steps of a run. Every process has one, in the same state, and calls the same methods in the same order.

    Process 0's `writer` alone writes into the run directory, apart from the checkpoints, which all save together.
    """

    config: Config
    world: World
    setup: TrainingSetup
    keys: Keys
    feed: Feed
    stragglers: Stragglers
    watchdog: Watchdog
    checkpoints: Checkpoints
    writer: RunWriter | SilentWriter
    profiler: Profiler
    #: What every checkpoint holds beside the state.
    meta: dict[str, Any]
    #: Steps taken when this part of the run starts, and when the run ends.
    first: int
    last: int
    state: TrainState
    #: True once the job was told to leave.
    leaving: bool
    #: Steps taken so far.
    step: int = field(init=False)
    #: The newest step that was given to `checkpoints`, and the newest that was evaluated.
    saved: int = field(init=False)
    evaluated: int | None = field(init=False, default=None)
    #: Each device's accumulator: zeros between two steps.
    sums: Array = field(init=False)

    def __post_init__(self) -> None:
        self.step = self.saved = self.first
        self.sums = self.setup.step_programs.zero_sums()

    def run(self) -> dict[str, Any]:
        """Take the remaining steps; returns the summary, on all processes."""
        try:
            self.loop()
            return self.finish()
        except LeaseLostError:
            raise  # the directory is another job's
        except BaseException as error:
            self.writer.write_failure(self.step, error)
            raise

    def loop(self) -> None:
        """Reserve, step, save, evaluate, publish: until the last step, or until the job is told to leave."""
        every = self.config.checkpoint.every_steps
        self.evaluate_resumed_step()
        while self.step < self.last and not self.leaving:
            if self.step == self.first or self.step % every == 0:
                self.writer.reserve(self.step, min(self.last, self.step - self.step % every + every))
            self.take_step()
            self.leaving = preempted(self.world)
            self.checkpoints.check()
            if self.step == self.last or self.evaluation_is_due() or self.leaving or self.step % every == 0:
                self.save()
            if self.measuring_is_due() and not self.leaving:
                self.look()
                self.evaluate()
            self.writer.publish_if_committed(self.saved, self.checkpoints)
        if self.leaving and self.saved < self.step:  # told so while this step, whose save was left out, was evaluated
            self.save()

    def take_step(self) -> None:
        """One step of DP-SGD (Abadi et al. 2016, Algorithm 1): sample, clip and sum, add noise, update."""
        step, programs = self.step, self.setup.step_programs
        self.profiler.before(step + 1, self.state)
        self.stragglers.began(step, self.state)
        assignment = self.feed.next_assignment()
        rounds, loss_key = self.feed.rounds(assignment), programs.loss_key(self.keys, step)
        sums = accumulate_sample(programs, self.state.params, self.sums, rounds, loss_key)
        self.stragglers.ready(step, sums, share_of_work(assignment, programs.local))
        self.state, self.sums, diagnostics, draw = noisy_update(programs, self.state, sums, self.keys, step)
        self.stragglers.ended(step, self.state)
        self.profiler.after(step + 1, self.state)

        self.writer.step_done(step, assignment, diagnostics, draw)
        self.writer.straggler_reports(self.stragglers.reports())
        self.writer.waited(self.stragglers.waiting)
        self.watchdog.beat(step)
        self.step += 1

    def save(self) -> None:
        """Begin to save this step, unless it is an interim one and the disk is still busy with the save before it.

        A disk slower than the steps must not hold them up.
        """
        stall = self.config.checkpoint.stall_timeout
        with self.watchdog.allow(self.config.cluster.shutdown_timeout + stall):
            self.writer.flush()  # what the newest step still takes is training
            with self.writer.phase("saving"):
                must, patience = self.step == self.last or self.leaving, self.world.timeout + stall
                if must or not decide(self.world, lambda: self.checkpoints.busy(stall), timeout=patience):
                    _save(self.step, self.state, self.meta, self.checkpoints, self.writer)
                    self.saved = self.step

    def measuring_is_due(self) -> bool:
        """Whether the parameters after this step are to be looked at."""
        every = self.config.training.evaluate_every or self.config.checkpoint.every_steps
        return self.step == self.last or self.step % every == 0

    def evaluation_is_due(self) -> bool:
        """Whether the parameters after this step are to be evaluated on test examples."""
        return self.setup.evaluator is not None and self.measuring_is_due()

    def look(self) -> None:
        """Note, under `private/`, the training loss and gradient norms of a few examples; on process 0 alone."""
        if self.setup.probe is not None:
            with self.writer.phase("evaluation"):
                incarnation = int(self.meta["plan"]["incarnation"])
                self.writer.looked(self.step, incarnation, look(self.setup, self.state))

    def evaluate(self) -> None:
        """Measure the test metrics of this step, or set `leaving` where the job is told to leave first."""
        if self.setup.evaluator is None:
            return
        allowed = self.watchdog.allow(self.config.cluster.initialization_timeout)
        with allowed, self.writer.phase("evaluation"):
            metrics = self.setup.evaluator.measure(self.state.released, stop=lambda: preempted(self.world))
        if metrics is None:
            self.leaving = True
        else:
            self.writer.evaluated(self.step, metrics)
            self.evaluated = self.step

    def evaluate_resumed_step(self) -> None:
        """Evaluate the checkpoint this part resumes from, if the part before it was ended between save and publish."""
        if self.step == 0 or self.leaving or not self.evaluation_is_due():
            return
        if not decide(self.world, lambda: self.writer.has_evaluation(self.step)):
            self.evaluate()

    def finish(self) -> dict[str, Any]:
        """Publish what the last save covers, and write the summary; leave together."""
        with self.watchdog.allow(self.config.cluster.initialization_timeout), self.writer.phase("saving"):
            self.writer.flush()
            self.profiler.close()
            self.checkpoints.wait()
            self.writer.check_lease()
            self.writer.publish(self.saved)
            self.writer.stop_recording()
            digest = params_digest(self.state.released)
            if decide(self.world, lambda: digest) != digest:
                raise RuntimeError("the processes hold different parameters: their hardware or libraries differ")
            ended = self.step == self.last and (not self.evaluation_is_due() or self.evaluated == self.step)
            finite = all_finite(self.state.released)
            summary = decide(
                self.world,
                lambda: self.writer.summary(step=self.step, ended=ended, params_sha256=digest, finite=finite),
            )
            self.writer.write_summary(summary)
            self.checkpoints.close()
            barrier("end", self.world)  # the first to leave would take the others down
        return summary


def _save(
    step: int, state: TrainState, meta: dict[str, Any], checkpoints: Checkpoints, writer: RunWriter | SilentWriter
) -> None:
    """Begin to save the state after `step` steps, if the run is still this job's."""
    writer.check_lease()
    writer.saving(step)
    checkpoints.save(step, state, meta | {"step": step, "charged_steps": writer.charged_steps()})
