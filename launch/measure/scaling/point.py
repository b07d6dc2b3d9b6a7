"""One point of a sweep: an arm at one node count, measured by all processes of a job, written by process 0.

It trains a few steps with a throw-away seed and keeps nothing but times and counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.cluster.agreement import barrier, decide, require_same
from dpdist.cluster.join import abort, join, leave
from dpdist.cluster.preemption import preempted
from dpdist.cluster.watchdog import Watchdog
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.data import Dataset, open_dataset
from dpdist.data.feed import Feed
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.ledger import Plan, PrivacyTerms
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import accumulate_sample, noisy_update
from dpdist.program.assignments import make_assigner, shape_of_work
from dpdist.program.build import OpenModel, TrainingSetup, build_setup, open_model
from dpdist.program.update import placed
from dpdist.run.directory import write_atomically
from dpdist.run.fingerprints import code_digest, environment, user_code_digest
from dpdist.run.plan import plan_run
from dpdist.run.private_log import log_to
from dpdist_launch.failures import report_failure
from dpdist_launch.measure.collective import all_reduce_program, all_reduce_seconds
from dpdist_launch.measure.machine import versions, whole_job
from dpdist_launch.measure.scaling.arms import DP, SGD_SYNC, Share, accumulate_and_share, all_reduces, config_of
from dpdist_launch.measure.scaling.directory import Point

EXIT_PREEMPTED = 75
#: Steps before the measured ones: the first touch buffers, connections and caches for the first time.
WARM_UP = 3
_ALL_REDUCE_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a point trains."""

    config: Config
    plan: Plan
    setup: TrainingSetup
    #: The all-reduce between two microbatches, in the arm that has one.
    share: Share | None
    dataset: Dataset
    secret: Secret
    world: World
    #: Measured steps; `WARM_UP` more come before them.
    steps: int


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The times of the measured steps."""

    #: Seconds from the end of the step before to the end of each step; they sum to the interval.
    step_seconds: tuple[float, ...]
    assignments: tuple[Assignment, ...]
    #: The accumulator after the last step, for the all-reduce in a program of its own.
    sums: Array


def run(config: dict[str, Any], arm: str, nodes: int, repeat: int, steps: int, result: str) -> None:
    """Measure one point and leave the job; every process of it calls this, as the last thing it does.

    Args:
        config: nested dicts, as `dpdist.config.from_dict` takes them; what quotes data, such as a traceback, goes to
            files in its `run.dir` that their owner alone can read.
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
        world = join(parsed.cluster)
        name = Point(arm=arm, nodes=nodes, repeat=repeat).name
        log_to(Path(parsed.run.dir) / f"{name}.rank-{world.process_id}.log")
        point = measure(parsed, arm, steps, world)
        if point is not None and world.is_main:
            whole = {"arm": arm, "nodes": nodes, "repeat": repeat} | point
            write_atomically(Path(result), json.dumps(whole, indent=2) + "\n")
        barrier("end of point", world)  # the first to leave would take the others down
        leave()
    except BaseException as error:
        abort(report_failure(error))
    if point is None:
        abort(EXIT_PREEMPTED)


def measure(config: Config, arm: str, steps: int, world: World) -> dict[str, Any] | None:
    """The point as JSON, on every process; None where the job was told to leave."""
    started, began = datetime.now(UTC), time.perf_counter()
    plain_or_private = config_of(arm, config)
    mine = {"code": code_digest(), "user_code": user_code_digest(config), "arm": arm, "steps": steps}
    require_same(mine | config_module.flatten(config), world)
    stacks = Path(config.run.dir) / f"rank-{world.process_id}.stacks"
    with contextlib.ExitStack() as cleanup:
        watchdog = Watchdog(config.cluster.watchdog_timeout, stacks, world.membership.label)
        cleanup.callback(watchdog.stop)
        with watchdog.allow(config.cluster.initialization_timeout):
            dataset = dataclasses.replace(open_dataset(config.data), test=None)  # nothing is evaluated
            # A seed and not a secret: it travels to all processes unencrypted, and nothing that it makes is kept.
            secret = Secret.from_insecure_seed(decide(world, lambda: secrets.randbits(63)))
            opened = open_model(config, dataset)
            plan = _plan(plain_or_private, dataset, opened, secret, world)
            if arm != DP:
                plain_or_private = _with_physical_batch(plain_or_private, config, plan, opened, dataset, world)
            building = time.perf_counter()
            setup = build_setup(plain_or_private, plan, opened, dataset, world, earlier=None)
            share = Share(setup.step_programs.zero_sums(), world.mesh) if arm == SGD_SYNC else None
            compile_seconds = time.perf_counter() - building
            reduce = all_reduce_program(setup.step_programs.zero_sums(), world.mesh)
        task = Task(
            config=config, plan=plan, setup=setup, share=share, dataset=dataset, secret=secret, world=world, steps=steps
        )
        timed = _train(task, watchdog)
        if timed is None:
            return None
        with watchdog.allow(config.cluster.initialization_timeout):
            reduce_seconds = all_reduce_seconds(reduce, timed.sums, calls=_ALL_REDUCE_CALLS)
            machine = whole_job(world)
    wall = sum(timed.step_seconds)
    median = statistics.median(timed.step_seconds)
    reduces = statistics.mean(all_reduces(arm, config, each.rounds) for each in timed.assignments)
    rate = plan.expected_batch_size * steps / wall
    return {
        "processes": world.num_processes,
        "devices": world.device_count,
        "steps": steps,
        "examples_per_second": rate,
        "examples_per_second_per_device": rate / world.device_count,
        "step_seconds": median,
        "step_seconds_p10": float(np.quantile(timed.step_seconds, 0.1)),
        "step_seconds_p90": float(np.quantile(timed.step_seconds, 0.9)),
        "compile_seconds": compile_seconds,
        **shape_of_work(timed.assignments),
        "all_reduce_seconds": reduce_seconds,
        "all_reduces_per_step": reduces,
        "all_reduce_share": reduce_seconds * reduces / median,
        "epsilon": None if plan.privacy is None else plan.privacy.epsilon,
        "physical_batch_size": setup.physical,
        "expected_batch_size": plan.expected_batch_size,
        "parameters": setup.step_programs.parameters,
        "hardware": machine,
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - began,
    }


def _plan(config: Config, dataset: Dataset, opened: OpenModel, secret: Secret, world: World) -> Plan:
    def make() -> dict[str, Any]:
        plan = plan_run(
            config,
            dataset_size=len(dataset.train),
            coordinates=opened.coordinates,
            nonce=fresh_nonce(secret),
            environment=environment(world.platform),
        )
        return plan.to_record()

    return Plan.from_record(decide(world, make, timeout=config.cluster.initialization_timeout))


def _with_physical_batch(
    plain: Config, private: Config, plan: Plan, opened: OpenModel, dataset: Dataset, world: World
) -> Config:
    """`plain` with the physical batch that the private arm gets here, so that all arms compute the same shapes.

    Only memory can make an automatic choice differ between arms, so the private programs are built to ask them;
    how much noise they would add does not matter.
    """
    if plain.training.physical_batch_size != "auto" or not private.privacy.enabled:
        return plain
    any_noise = PrivacyTerms(
        clip_norm=private.privacy.clip_norm,
        noise_multiplier=1.0,
        delta=math.nan,
        epsilon=math.nan,
        epsilon_rdp=math.nan,
        accountant="none",
        renyi_order=0,
        grid=private.privacy.clip_norm * 2.0**-36,
    )
    noisy = dataclasses.replace(plan, privacy=any_noise)
    physical = build_setup(private, noisy, opened, dataset, world, earlier=None).physical
    return dataclasses.replace(plain, training=dataclasses.replace(plain.training, physical_batch_size=physical))


def _train(task: Task, watchdog: Watchdog) -> Timed | None:
    """The steps of `dpdist.trainer`, without ledger, checkpoints and records; None where the job has to leave."""
    world, programs, keys = task.world, task.setup.step_programs, Keys(task.secret, bytes.fromhex(task.plan.nonce))
    state, sums = placed(task.setup.initial, programs.replicated), programs.zero_sums()
    assigner = make_assigner(task.config, task.plan, task.setup, keys, world)
    # It works on beyond the last measured step, as it would in training.
    stop = WARM_UP + task.steps + 2
    feed = Feed(task.dataset.train, assigner, world.mesh, data=task.config.data, start=0, stop=stop)
    assignments: list[Assignment] = []
    ends: list[float] = []
    unfinished: Array | None = None
    try:
        for step in range(WARM_UP + task.steps):
            if step == WARM_UP:
                jax.block_until_ready((state, sums))
                barrier("warm-up", world)
                assignments, ends, unfinished = [], [time.perf_counter()], None
            assignments.append(feed.next_assignment())
            rounds, loss_key = feed.rounds(assignments[-1]), programs.loss_key(keys, step)
            if task.share is None:
                sums = accumulate_sample(programs, state.params, sums, rounds, loss_key)
            else:
                sums = accumulate_and_share(programs, task.share, state.params, sums, rounds, loss_key)
            state, sums, diagnostics, _ = noisy_update(programs, state, sums, keys, step)
            if unfinished is not None:  # one step behind, as the recorder of a run
                jax.block_until_ready(unfinished)
                ends.append(time.perf_counter())
            unfinished = diagnostics
            watchdog.beat(step)
            if preempted(world):
                return None
        jax.block_until_ready((state, sums))
        ends.append(time.perf_counter())
    finally:
        feed.close()
    seconds = tuple(stop - start for start, stop in pairwise(ends))
    return Timed(step_seconds=seconds, assignments=tuple(assignments), sums=sums)


def main() -> None:
    """`python -m dpdist_launch.measure.scaling.point FILE`: a rank of a local job; FILE has the arguments of `run`."""
    run(**json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
