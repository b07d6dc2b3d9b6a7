"""One point of a sweep: an arm at one node count, measured by all processes of a job, written by process 0.

It trains a few steps with a throw-away seed and keeps nothing but times and counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.cluster.agreement import barrier, decide, require_same
from dpdist.cluster.job import Job
from dpdist.cluster.join import abort, join, leave
from dpdist.cluster.preemption import preempted
from dpdist.cluster.watchdog import Watchdog
from dpdist.config import Config
from dpdist.data import Dataset, open_dataset
from dpdist.data.feed import Feed
from dpdist.errors import InputError
from dpdist.identity import code_digest, environment, user_code_digest
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.sampling import StepPlan
from dpdist.plan import plan_run
from dpdist.programs import Programs, build_programs
from dpdist.rundir import write_atomically
from dpdist.train import make_planner
from launch.bench.collective import all_reduce_program, all_reduce_seconds
from launch.scaling.arms import DP, SGD_SYNC, Share, accumulate_step, all_reduces, config_of
from launch.scaling.machine import hardware, versions

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_PREEMPTED = 1, 2, 75
#: Steps before the measured ones: the first touch buffers, connections and caches for the first time.
WARM_UP = 3
_ALL_REDUCE_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What the measured steps showed."""

    #: Seconds from the end of the step before to the end of each step; they sum to the interval.
    step_seconds: tuple[float, ...]
    plans: tuple[StepPlan, ...]
    #: The accumulator after the last step, for the all-reduce in a program of its own.
    sums: Array


def run(config: dict[str, Any], arm: str, nodes: int, repeat: int, steps: int, result: str) -> None:
    """Measure one point and leave the job; every process of it calls this, as the last thing it does.

    Args:
        config: nested dicts, as `dpdist.config.from_dict` takes them; stacks of a stuck process go to its `run.dir`.
        arm: a key of `ARMS`.
        nodes: how many nodes the job was given.
        repeat: which of the equal measurements this is, from 1.
        steps: measured steps, at least 1; `WARM_UP` more come before them.
        result: the JSON file that process 0 writes.

    Ends the process with exit code 75 where the job was told to leave, 2 for bad input and 1 for any other
    failure: an ordinary exit would wait for processes that wait for this one.
    """
    # submitit ignores TERM. Until JAX takes it over, it must end the process, which the launcher understands.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        parsed = config_module.from_dict(config)
        job = join(parsed.cluster)
        point = measure(parsed, arm, steps, job)
        if point is not None and job.is_main:
            whole = {"arm": arm, "nodes": nodes, "repeat": repeat} | point
            write_atomically(Path(result), json.dumps(whole, indent=2) + "\n")
        barrier("end of point", job)  # the first to leave would take the others down
        leave()
    except InputError as error:
        print(f"dpdist: error: {error}", file=sys.stderr)
        abort(EXIT_BAD_INPUT)
    except BaseException as error:
        traceback.print_exc()
        print(f"dpdist: failed with {type(error).__name__}", file=sys.stderr)
        abort(EXIT_FAILED)
    if point is None:
        abort(EXIT_PREEMPTED)


def measure(config: Config, arm: str, steps: int, job: Job) -> dict[str, Any] | None:
    """The point as JSON holds it, on every process; None where the job was told to leave."""
    started, began = datetime.now(UTC), time.perf_counter()
    plain_or_private = config_of(arm, config)
    mine = {"code": code_digest(), "user_code": user_code_digest(config), "arm": arm, "steps": steps}
    require_same(mine | config_module.flatten(config), job)
    stacks = Path(config.run.dir) / f"rank-{job.process_id}.stacks"
    with contextlib.ExitStack() as cleanup:
        watchdog = Watchdog(config.cluster.watchdog_timeout, stacks, job.membership.label)
        cleanup.callback(watchdog.stop)
        with watchdog.allow(config.cluster.initialization_timeout):
            dataset = dataclasses.replace(open_dataset(config.data), test=None)  # nothing is evaluated
            # A seed and not a secret: it travels to all processes unencrypted, and nothing that it makes is kept.
            secret = Secret.from_insecure_seed(decide(job, lambda: secrets.randbits(63)))
            plan = _plan(plain_or_private, dataset, secret, job)
            if arm != DP:
                plain_or_private = _with_physical_batch(plain_or_private, config, plan, dataset, job)
            building = time.perf_counter()
            programs = build_programs(plain_or_private, plan, dataset, job, earlier=None)
            share = Share(programs.step.zero_sums(), job.mesh) if arm == SGD_SYNC else None
            compile_seconds = time.perf_counter() - building
            reduce = all_reduce_program(programs.step.zero_sums(), job.mesh)
        timed = _train(config, plan, programs, share, dataset, secret, job, steps, watchdog)
        if timed is None:
            return None
        with watchdog.allow(config.cluster.initialization_timeout):
            reduce_seconds = all_reduce_seconds(reduce, timed.sums, calls=_ALL_REDUCE_CALLS)
            machine = hardware(job)
    wall = sum(timed.step_seconds)
    median = statistics.median(timed.step_seconds)
    reduces = statistics.mean(all_reduces(arm, config, len(plan.microbatches)) for plan in timed.plans)
    rate = plan.expected_batch_size * steps / wall
    return {
        "processes": job.num_processes,
        "devices": job.device_count,
        "steps": steps,
        "examples_per_second": rate,
        "examples_per_second_per_device": rate / job.device_count,
        "step_seconds": median,
        "step_seconds_p10": float(np.quantile(timed.step_seconds, 0.1)),
        "step_seconds_p90": float(np.quantile(timed.step_seconds, 0.9)),
        "compile_seconds": compile_seconds,
        **shape_of_work(timed.plans),
        "all_reduce_seconds": reduce_seconds,
        "all_reduces_per_step": reduces,
        "all_reduce_share": reduce_seconds * reduces / median,
        "epsilon": plan.epsilon,
        "physical_batch_size": programs.physical,
        "expected_batch_size": plan.expected_batch_size,
        "parameters": programs.step.parameters,
        "hardware": machine,
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - began,
    }


def shape_of_work(plans: tuple[StepPlan, ...]) -> dict[str, float]:
    """How evenly the sampled examples filled the devices, over all of `plans`.

    `padding`: the fraction of computed slots that held no example. `imbalance`: mean over steps of the most
    examples on a device over the mean of all devices; 1 is even. `microbatches_per_step`: mean.
    """
    slots = sum(len(plan.slices) * sum(plan.microbatches) for plan in plans)
    sampled = sum(len(plan.sample) for plan in plans)
    uneven = [
        max(stop - start for start, stop in plan.slices) * len(plan.slices) / len(plan.sample)
        for plan in plans
        if len(plan.sample)
    ]
    return {
        "padding": 1 - sampled / slots if slots else 0.0,
        "imbalance": statistics.mean(uneven) if uneven else 1.0,
        "microbatches_per_step": statistics.mean(len(plan.microbatches) for plan in plans),
    }


def _plan(config: Config, dataset: Dataset, secret: Secret, job: Job) -> Plan:
    def make() -> dict[str, Any]:
        here = environment(job.platform)
        return asdict(plan_run(config, dataset_size=len(dataset.train), nonce=fresh_nonce(secret), environment=here))

    return Plan(**decide(job, make, timeout=config.cluster.initialization_timeout))


def _with_physical_batch(plain: Config, private: Config, plan: Plan, dataset: Dataset, job: Job) -> Config:
    """`plain` with the physical batch that the private arm gets here, so that all arms compute the same shapes.

    Only memory can make an automatic choice differ between arms, so the private programs are built to ask them;
    how much noise they would add does not matter.
    """
    if plain.training.physical_batch_size != "auto" or not private.privacy.enabled:
        return plain
    noisy = dataclasses.replace(plan, clip_norm=private.privacy.clip_norm, noise_multiplier=1.0)
    physical = build_programs(private, noisy, dataset, job, earlier=None).physical
    return dataclasses.replace(plain, training=dataclasses.replace(plain.training, physical_batch_size=physical))


def _train(
    config: Config,
    plan: Plan,
    programs: Programs,
    share: Share | None,
    dataset: Dataset,
    secret: Secret,
    job: Job,
    steps: int,
    watchdog: Watchdog,
) -> Timed | None:
    """The loop of `dpdist.train`, without ledger, checkpoints and records; None where the job has to leave."""
    step, keys = programs.step, Keys(secret, bytes.fromhex(plan.nonce))
    state, sums = step.place(programs.initial), step.zero_sums()
    planner = make_planner(config, plan, programs, keys, job)
    # It works on beyond the last measured step, as it would in training.
    feed = Feed(dataset.train, planner, job.mesh, data=config.data, start=0, stop=WARM_UP + steps + 2)
    plans: list[StepPlan] = []
    ends: list[float] = []
    unfinished: Array | None = None
    try:
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                jax.block_until_ready((state, sums))
                barrier("warm-up", job)
                plans, ends, unfinished = [], [time.perf_counter()], None
            plans.append(feed.next_plan())
            loss_key, count = step.loss_key(keys, number), len(plans[-1].microbatches)
            batches = feed.microbatches(plans[-1])
            sums = accumulate_step(step, share, state.params, sums, batches, count, loss_key)
            noise, _ = step.draw(keys, number)
            state, sums, diagnostics = step.apply(state, sums, noise)
            if unfinished is not None:  # one step behind, as the recorder of a run
                jax.block_until_ready(unfinished)
                ends.append(time.perf_counter())
            unfinished = diagnostics
            watchdog.beat(number)
            if preempted(job):
                return None
        jax.block_until_ready((state, sums))
        ends.append(time.perf_counter())
    finally:
        feed.close()
    seconds = tuple(stop - start for start, stop in pairwise(ends))
    return Timed(step_seconds=seconds, plans=tuple(plans), sums=sums)


def main() -> None:
    """`python -m launch.scaling.point FILE`: a rank of a local job; FILE holds the arguments of `run` as JSON."""
    run(**json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
