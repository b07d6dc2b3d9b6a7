"""Where the time of a training step goes, stage by stage, as fractions of the step.

Each stage is waited for before the next begins, so that its time is its own. The feed works ahead on its
thread all the while, as in training: only the time it could not hide counts as waiting for data.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from dpdist import config as config_module
from dpdist.cluster.join import join
from dpdist.config import Config
from dpdist.data import open_dataset
from dpdist.data.feed import Feed
from dpdist.errors import InputError
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.step import accumulate_sample, noisy_update
from dpdist.program.assignments import make_assigner
from dpdist.program.build import build_setup, open_model
from dpdist.program.update import placed
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.fingerprints import code_digest, environment
from dpdist.run.plan import plan_run
from dpdist_launch.measure.bench.progress import Progress, to_stderr
from dpdist_launch.measure.collective import all_reduce_program

_WARM_UP = 2


def bench_step(config: Config, *, steps: int, progress: Progress = to_stderr) -> dict[str, Any]:
    """Run `steps` steps of `config` with a throw-away secret, and time their stages.

    Returns medians over steps, in seconds and as fractions of the step: `sampling_and_planning` (on the feed's
    thread, hidden behind the devices), `data_wait`, `accumulate`, `all_reduce` (the same vector in a program
    of its own), `noise_and_update` (the rest of the update), and `checkpoint_stall` (time a save holds the
    loop, spread over `checkpoint.every_steps`).
    """
    if steps < 1:
        raise InputError("--steps", steps, "give at least 1.")
    world = join(config.cluster)
    if world.num_processes > 1:
        raise InputError("dpdist bench step", f"{world.num_processes} processes", "run it in one process.")
    dataset = open_dataset(config.data)
    secret = Secret.fresh()
    nonce = fresh_nonce(secret)
    opened = open_model(config, dataset)
    progress(f"{opened.coordinates:,} parameters; planning, compiling")
    plan = plan_run(
        config,
        dataset_size=len(dataset.train),
        coordinates=opened.coordinates,
        nonce=nonce,
        environment=environment(world.platform),
    )
    setup = build_setup(config, plan, opened, dataset, world, earlier=None)
    programs, keys = setup.step_programs, Keys(secret, nonce)
    state, sums = placed(setup.initial, programs.replicated), programs.zero_sums()
    all_reduce = all_reduce_program(sums, world.mesh)
    assigner = make_assigner(config, plan, setup, keys, world)
    feed = Feed(dataset.train, assigner, world.mesh, data=config.data, start=0, stop=_WARM_UP + steps)
    stages: dict[str, list[float]] = {name: [] for name in ("data_wait", "accumulate", "all_reduce", "apply", "step")}
    for number in range(_WARM_UP + steps):
        progress(f"step {number + 1} of {_WARM_UP + steps}")
        if number == _WARM_UP:
            planned_before = feed.assign_seconds
            stages = {name: [] for name in stages}
        began, waited = time.perf_counter(), feed.wait_seconds
        assignment = feed.next_assignment()
        loss_key = programs.loss_key(keys, number)
        for batches in feed.rounds(assignment):
            sums = jax.block_until_ready(accumulate_sample(programs, state.params, sums, [batches], loss_key))
        accumulated = time.perf_counter()
        jax.block_until_ready(all_reduce(sums))
        reduced = time.perf_counter()
        state, sums, *_ = jax.block_until_ready(noisy_update(programs, state, sums, keys, number))
        ended = time.perf_counter()
        waited = feed.wait_seconds - waited
        for name, spent in (
            ("data_wait", waited),
            ("accumulate", accumulated - began - waited),
            ("all_reduce", reduced - accumulated),
            ("apply", ended - reduced),
            ("step", ended - began - (reduced - accumulated)),
        ):
            stages[name].append(spent)
    progress("saves")
    median = {name: statistics.median(values) for name, values in stages.items()}
    seconds = {
        "sampling_and_planning": (feed.assign_seconds - planned_before) / steps,
        "data_wait": median["data_wait"],
        "accumulate": median["accumulate"],
        "all_reduce": median["all_reduce"],
        "noise_and_update": max(0.0, median["apply"] - median["all_reduce"]),
        "checkpoint_stall": _checkpoint_stall(state, config) / config.checkpoint.every_steps,
    }
    feed.close()
    return {
        "what": "one training step, stage by stage; fractions of the median step",
        "step_seconds": median["step"],
        "fractions": {name: round(value / median["step"], 5) for name, value in seconds.items()},
        "seconds": seconds,
        "examples_per_second": plan.expected_batch_size / median["step"],
        "steps": steps,
        "physical_batch_size": setup.physical,
        "devices": world.device_count,
        "device_kind": jax.devices()[0].device_kind,
        "environment": environment(world.platform),
        "code": code_digest(),
        "config": config_module.to_dict(config),
    }


def _checkpoint_stall(state: Any, config: Config) -> float:
    """Median seconds that beginning a save holds the training loop."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints", keep=config.checkpoint.keep)
        stalls = []
        for step in range(4):
            began = time.perf_counter()
            checkpoints.save(step, state, {"step": step})
            stalls.append(time.perf_counter() - began)
            checkpoints.wait()
        checkpoints.close()
    return statistics.median(stalls[1:])
