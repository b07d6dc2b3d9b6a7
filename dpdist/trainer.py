"""A run from its config to its summary. Reads top to bottom: join, agree, plan, build, resume, steps, end."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.cluster.agreement import barrier, decide, require_same
from dpdist.cluster.join import join
from dpdist.cluster.lease import LeaseLostError
from dpdist.cluster.preemption import preempted
from dpdist.cluster.straggler import Stragglers
from dpdist.cluster.watchdog import Watchdog
from dpdist.config import Config
from dpdist.data import check_labels, fingerprint, open_dataset
from dpdist.data.feed import Feed
from dpdist.mechanism.keys import Keys
from dpdist.program.assignments import make_assigner
from dpdist.program.build import build_setup
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import code_digest, environment, params_digest, user_code_digest
from dpdist.run.private_log import keep_out_of_logs, log_to
from dpdist.run.progress import say
from dpdist.run.recorder import Recorder
from dpdist.run.resume import (
    begin,
    find_start,
    open_ledger,
    open_secret,
    present,
    require_fits,
    spending_of,
    take_lease,
)
from dpdist.run.summary import closing_line, opening_line, summarise

logger = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train the run that `config` describes, or go on with it where `config.run.dir` holds it already.

    Every process of the job calls this. Returns the summary, also written to `summary.json`; a run that has
    ended is not run again. Its `status` is `finished`, `budget_exhausted`, or `preempted` after SIGTERM.

    Raises:
        InputError: something given cannot be used; this call has taken no step.
    """
    world = join(config.cluster)
    run = RunDirectory(Path(config.run.dir))

    # Agree: one config, one code, one directory, one secret, one dataset.
    mine = {"code": code_digest(), "user_code": user_code_digest(config), "environment": environment(world.platform)}
    require_same(mine | config_module.flatten(config), world)
    decide(world, run.prepare)
    log_to(run.logs / f"rank-{world.process_id}.log")  # from here on, texts that may quote data go there alone
    ended = decide(world, lambda: run.ended(config))
    if ended is not None:
        if world.is_main:
            say(f"{run.root} is {ended['status']} at step {ended['step']} of {ended['steps']}: nothing to do")
        return ended
    stacks = run.logs / f"rank-{world.process_id}.stacks"
    with contextlib.ExitStack() as cleanup:
        lease = take_lease(config, run, world)
        if lease is not None:
            cleanup.callback(lease.release)
        dataset = open_dataset(config.data)
        for source in (dataset.train, dataset.test):
            if source is not None and (classes := config.model.classes or dataset.classes) is not None:
                check_labels(source, classes)
        secret, secret_lost = open_secret(config, run, world)
        keep_out_of_logs(secret)
        data_tag = secret.tag(b"data" + fingerprint(dataset.train))
        tags = {"secret": secret.tag(b"agreement"), "training data": data_tag}
        require_same(tags, world, hidden=tags)
        watchdog = Watchdog(config.cluster.watchdog_timeout, stacks, world.membership.label)
        cleanup.callback(watchdog.stop)

        with watchdog.allow(config.cluster.initialization_timeout):
            # Plan: from which checkpoint, as which incarnation, with which constants; fixed before the first step.
            ledger = open_ledger(run, world)
            checkpoints = Checkpoints(
                run.checkpoints, keep=config.checkpoint.keep, timeout=config.cluster.shutdown_timeout
            )
            now = present(config, world, data=data_tag)
            begun = find_start(
                config,
                run,
                ledger,
                checkpoints,
                secret,
                now,
                world,
                secret_lost=secret_lost,
                dataset_size=len(dataset.train),
            )
            plan, start = begun.plan, begun.step or 0
            if world.is_main:
                say(opening_line(plan, world, insecure=secret.insecure))

            # Build: compile every shape that can occur; place the state, new or restored, on the devices.
            setup = build_setup(config, plan, dataset, world, begun.decisions)
            step_programs, evaluator = setup.step_programs, setup.evaluator
            require_fits(begun, setup.decisions()["leaves"])
            require_same({"initial parameters": params_digest(setup.initial.params)}, world)
            if evaluator is not None:
                cleanup.callback(evaluator.close)
            state = step_programs.place(setup.initial)
            if begun.step is not None:
                state = checkpoints.restore(begun.step, state)
            decide(world, lambda: begin(begun, config, run, lease, ledger, checkpoints))
            meta = {"config": config_module.to_dict(config), "plan": asdict(plan), "topology": now.topology}
            meta |= setup.decisions()

            def save(step: int) -> None:
                charged = 0
                if ledger is not None and lease is not None:  # process 0, which is the one that writes it
                    lease.check()
                    charged = ledger.charged_steps()
                checkpoints.save(step, state, meta | {"step": step, "charged_steps": charged})

            if begun.step is None:
                save(0)
                checkpoints.wait()
            leaving = preempted(world)  # told so while all of this was under way?

        # Steps: reserve, sample, accumulate, draw, apply.
        keys = Keys(secret, bytes.fromhex(plan.nonce))
        recorder = Recorder(config, begun, run, world, spending_of(ledger))
        cleanup.callback(recorder.close)
        assigner = make_assigner(config, plan, setup, keys, world)
        feed = Feed(dataset.train, assigner, world.mesh, data=config.data, start=start, stop=plan.steps)
        cleanup.callback(feed.close)
        stragglers = Stragglers(world)
        block, stall = config.checkpoint.every_steps, config.checkpoint.stall_timeout
        evaluate_every = config.training.evaluate_every or block
        sums, step, saved, measured = step_programs.zero_sums(), start, start, None

        def note_failure(kind: object, *_: object) -> None:
            if kind is not None and kind is not LeaseLostError and ledger is not None:
                failed = summarise(plan, world, config, recorder, ledger, step=step, ended=False, digest=None)
                with contextlib.suppress(OSError):  # a full disk must not hide what it has led to
                    run.write_summary(failed)

        def measure(step: int) -> bool:
            """Evaluate, and say whether it could be done before the job was told to leave."""
            nonlocal measured
            assert evaluator is not None
            accuracy = evaluator.accuracy(state.released, stop=lambda: preempted(world))
            if accuracy is not None:
                recorder.evaluated(step, accuracy)
                measured = step
            return accuracy is not None

        def due(step: int) -> bool:
            return evaluator is not None and (step == plan.steps or step % evaluate_every == 0)

        cleanup.push(note_failure)
        if start > 0 and due(start) and not leaving and not decide(world, lambda: recorder.has_accuracy(start)):
            with watchdog.allow(config.cluster.initialization_timeout):
                leaving = not measure(start)  # the former part of this run saved this step, and came no further
        while step < plan.steps and not leaving:
            if ledger is not None and lease is not None and (step == start or step % block == 0):
                lease.check()
                ledger.reserve(step, min(plan.steps, step - step % block + block))

            stragglers.began(step, state)
            assignment, loss_key = feed.next_assignment(), step_programs.loss_key(keys, step)
            for batch in feed.microbatches(assignment):
                sums = step_programs.accumulate(state.params, sums, batch, loss_key)
            stragglers.ready(step, sums)
            noise, draw = step_programs.draw(keys, step)
            state, sums, diagnostics = step_programs.apply(state, sums, noise)
            stragglers.ended(step, state)

            recorder.step_done(step, assignment, diagnostics, draw)
            recorder.waited_for(stragglers.reports())
            watchdog.beat(step)
            step += 1
            leaving = preempted(world)
            checkpoints.check()
            if step == plan.steps or due(step) or leaving or step % block == 0:
                with watchdog.allow(config.cluster.shutdown_timeout + stall):
                    # A disk slower than the steps must not hold them up: an interim save is left out meanwhile.
                    must = step == plan.steps or leaving
                    if must or not decide(world, lambda: checkpoints.busy(stall), timeout=world.timeout + stall):
                        recorder.flush()
                        save(step)
                        saved = step
            if due(step) and not leaving:
                with watchdog.allow(config.cluster.initialization_timeout):
                    leaving = not measure(step)
            if ledger is not None and saved > ledger.saved_step and checkpoints.committed(saved):
                ledger.record_saved(saved, now.topology)
                recorder.committed(saved)

        # End: what was measured is shown only once it is safe on disk.
        with watchdog.allow(config.cluster.initialization_timeout):
            recorder.flush()
            checkpoints.wait()
            if ledger is not None and lease is not None:
                lease.check()
                ledger.record_saved(saved, now.topology)
                recorder.committed(saved)
            recorder.close()
            digest = params_digest(state.released)
            if decide(world, lambda: digest) != digest:
                raise RuntimeError("the processes hold different parameters: their hardware or libraries differ")
            ended = step == plan.steps and (not due(step) or measured == step)
            summary = decide(
                world, lambda: summarise(plan, world, config, recorder, ledger, step=step, ended=ended, digest=digest)
            )
            if world.is_main:
                run.write_summary(summary)
                if config.run.plots:
                    plot_if_possible(run)
                say(closing_line(summary, run.root))
            checkpoints.close()
            barrier("end", world)  # the first to leave would take the others down
        return summary


def plot_if_possible(run: RunDirectory) -> None:
    """Plots are a convenience: a run must not fail for want of a font or of space for them."""
    try:
        from dpdist.run.plots import plot_run  # matplotlib, for process 0 alone

        plot_run(run.root)
    except Exception:
        logger.exception("the plots could not be written")
