"""A run from its config to its summary. Reads top to bottom: join, agree, plan, build, resume, steps, end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.checkpoint import Checkpoints
from dpdist.cluster.agreement import barrier, decide, require_same
from dpdist.cluster.job import Job
from dpdist.cluster.join import join
from dpdist.cluster.lease import LeaseLostError
from dpdist.cluster.preemption import preempted
from dpdist.cluster.straggler import Stragglers
from dpdist.cluster.watchdog import Watchdog
from dpdist.config import Config
from dpdist.data import check_labels, fingerprint, open_dataset
from dpdist.data.feed import Feed
from dpdist.identity import code_digest, environment, params_digest, user_code_digest
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.sampling import StepPlan, plan_step, poisson_sample
from dpdist.privatelog import keep_out_of_logs, log_to
from dpdist.programs import Programs, build_programs
from dpdist.progress import say
from dpdist.recorder import Recorder
from dpdist.resume import begin, find_start, open_ledger, open_secret, present, require_fits, spending_of, take_lease
from dpdist.rundir import RunDirectory
from dpdist.summary import closing_line, opening_line, summarise

logger = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train the run that `config` describes, or go on with it where `config.run.dir` holds it already.

    Every process of the job calls this. Returns the summary, also written to `summary.json`; a run that has
    ended is not run again. Its `status` is `finished`, `budget_exhausted`, or `preempted` after SIGTERM.

    Raises:
        InputError: something given cannot be used; this call has taken no step.
    """
    job = join(config.cluster)
    run = RunDirectory(Path(config.run.dir))

    # Agree: one config, one code, one directory, one secret, one dataset.
    mine = {"code": code_digest(), "user_code": user_code_digest(config), "environment": environment(job.platform)}
    require_same(mine | config_module.flatten(config), job)
    decide(job, run.prepare)
    log_to(run.logs / f"rank-{job.process_id}.log")  # from here on, texts that may quote data go there alone
    ended = decide(job, lambda: run.ended(config))
    if ended is not None:
        if job.is_main:
            say(f"{run.root} is {ended['status']} at step {ended['step']} of {ended['steps']}: nothing to do")
        return ended
    stacks = run.logs / f"rank-{job.process_id}.stacks"
    with contextlib.ExitStack() as cleanup:
        lease = take_lease(config, run, job)
        if lease is not None:
            cleanup.callback(lease.release)
        dataset = open_dataset(config.data)
        for source in (dataset.train, dataset.test):
            if source is not None and (classes := config.model.classes or dataset.classes) is not None:
                check_labels(source, classes)
        secret, secret_lost = open_secret(config, run, job)
        keep_out_of_logs(secret)
        data_tag = secret.tag(b"data" + fingerprint(dataset.train))
        tags = {"secret": secret.tag(b"agreement"), "training data": data_tag}
        require_same(tags, job, hidden=tags)
        watchdog = Watchdog(config.cluster.watchdog_timeout, stacks, job.membership.label)
        cleanup.callback(watchdog.stop)

        with watchdog.allow(config.cluster.initialization_timeout):
            # Plan: from which checkpoint, as which incarnation, with which constants; fixed before the first step.
            ledger = open_ledger(run, job)
            checkpoints = Checkpoints(
                run.checkpoints, keep=config.checkpoint.keep, timeout=config.cluster.shutdown_timeout
            )
            now = present(config, job, data=data_tag)
            begun = find_start(
                config,
                run,
                ledger,
                checkpoints,
                secret,
                now,
                job,
                secret_lost=secret_lost,
                dataset_size=len(dataset.train),
            )
            plan, start = begun.plan, begun.step or 0
            if job.is_main:
                say(opening_line(plan, job, insecure=secret.insecure))

            # Build: compile every shape that can occur; place the state, new or restored, on the devices.
            programs = build_programs(config, plan, dataset, job, begun.decisions)
            step_programs, evaluator = programs.step, programs.evaluator
            require_fits(begun, programs.decisions()["leaves"])
            require_same({"initial parameters": params_digest(programs.initial.params)}, job)
            if evaluator is not None:
                cleanup.callback(evaluator.close)
            state = step_programs.place(programs.initial)
            if begun.step is not None:
                state = checkpoints.restore(begun.step, state)
            decide(job, lambda: begin(begun, config, run, lease, ledger, checkpoints))
            meta = {"config": config_module.to_dict(config), "plan": asdict(plan), "topology": now.topology}
            meta |= programs.decisions()

            def save(step: int) -> None:
                charged = 0
                if ledger is not None and lease is not None:  # process 0, which is the one that writes it
                    lease.check()
                    charged = ledger.charged_steps()
                checkpoints.save(step, state, meta | {"step": step, "charged_steps": charged})

            if begun.step is None:
                save(0)
                checkpoints.wait()
            leaving = preempted(job)  # told so while all of this was under way?

        # Steps: reserve, sample, accumulate, draw, apply.
        keys = Keys(secret, bytes.fromhex(plan.nonce))
        recorder = Recorder(config, begun, run, job, spending_of(ledger))
        cleanup.callback(recorder.close)
        planner = make_planner(config, plan, programs, keys, job)
        feed = Feed(dataset.train, planner, job.mesh, data=config.data, start=start, stop=plan.steps)
        cleanup.callback(feed.close)
        stragglers = Stragglers(job)
        block, stall = config.checkpoint.every_steps, config.checkpoint.stall_timeout
        evaluate_every = config.training.evaluate_every or block
        sums, step, saved, measured = step_programs.zero_sums(), start, start, None

        def note_failure(kind: object, *_: object) -> None:
            if kind is not None and kind is not LeaseLostError and ledger is not None:
                failed = summarise(plan, job, config, recorder, ledger, step=step, ended=False, digest=None)
                with contextlib.suppress(OSError):  # a full disk must not hide what it has led to
                    run.write_summary(failed)

        def measure(step: int) -> bool:
            """Evaluate, and say whether it could be done before the job was told to leave."""
            nonlocal measured
            assert evaluator is not None
            accuracy = evaluator.accuracy(state.released, stop=lambda: preempted(job))
            if accuracy is not None:
                recorder.evaluated(step, accuracy)
                measured = step
            return accuracy is not None

        def due(step: int) -> bool:
            return evaluator is not None and (step == plan.steps or step % evaluate_every == 0)

        cleanup.push(note_failure)
        if start > 0 and due(start) and not leaving and not decide(job, lambda: recorder.has_accuracy(start)):
            with watchdog.allow(config.cluster.initialization_timeout):
                leaving = not measure(start)  # the former part of this run saved this step, and came no further
        while step < plan.steps and not leaving:
            if ledger is not None and lease is not None and (step == start or step % block == 0):
                lease.check()
                ledger.reserve(step, min(plan.steps, step - step % block + block))

            stragglers.began(step, state)
            step_plan, loss_key = feed.next_plan(), step_programs.loss_key(keys, step)
            for batch in feed.microbatches(step_plan):
                sums = step_programs.accumulate(state.params, sums, batch, loss_key)
            stragglers.ready(step, sums)
            noise, draw = step_programs.draw(keys, step)
            state, sums, diagnostics = step_programs.apply(state, sums, noise)
            stragglers.ended(step, state)

            recorder.step_done(step, step_plan, diagnostics, draw)
            recorder.waited_for(stragglers.reports())
            watchdog.beat(step)
            step += 1
            leaving = preempted(job)
            checkpoints.check()
            if step == plan.steps or due(step) or leaving or step % block == 0:
                with watchdog.allow(config.cluster.shutdown_timeout + stall):
                    # A disk slower than the steps must not hold them up: an interim save is left out meanwhile.
                    must = step == plan.steps or leaving
                    if must or not decide(job, lambda: checkpoints.busy(stall), timeout=job.timeout + stall):
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
            if decide(job, lambda: digest) != digest:
                raise RuntimeError("the processes hold different parameters: their hardware or libraries differ")
            ended = step == plan.steps and (not due(step) or measured == step)
            summary = decide(
                job, lambda: summarise(plan, job, config, recorder, ledger, step=step, ended=ended, digest=digest)
            )
            if job.is_main:
                run.write_summary(summary)
                plot_if_possible(run)
                say(closing_line(summary, run.root))
            checkpoints.close()
            barrier("end", job)  # the first to leave would take the others down
        return summary


def plot_if_possible(run: RunDirectory) -> None:
    """Plots are a convenience: a run must not fail for want of a font or of space for them."""
    try:
        from dpdist.plots import plot_run  # matplotlib, for process 0 alone

        plot_run(run.root)
    except Exception:
        logger.exception("the plots could not be written")


def make_planner(config: Config, plan: Plan, programs: Programs, keys: Keys, job: Job) -> Callable[[int], StepPlan]:
    """step -> `StepPlan`, the same on every process; called on the feed's thread."""

    def plan_one(step: int) -> StepPlan:
        sample = poisson_sample(keys.sampling(step), plan.sampling_probability, 0, plan.dataset_size)
        return plan_step(
            step,
            sample,
            assignment=config.sampling.assignment,
            dataset_size=plan.dataset_size,
            host_of_device=job.host_of_device,
            physical=programs.physical,
            tail=programs.tail,
        )

    return plan_one
