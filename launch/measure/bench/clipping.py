"""Time every method of computing a clipped gradient sum, side by side on one physical batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from dpdist.errors import InputError
from dpdist.run.directory import write_atomically
from dpdist_launch.measure import machine
from dpdist_launch.measure.bench import arms, peers, table
from dpdist_launch.measure.bench.naive import naive_series
from dpdist_launch.measure.bench.program import Arm, Program, Sums, largest_batch
from dpdist_launch.measure.bench.rounds import Clock, interleaved, ratios
from dpdist_launch.measure.bench.tasks import TASKS, Problem, Task, problem_of

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, and how. Construction raises InputError for a value out of range or an unknown name."""

    #: Names of `TASKS`.
    models: Sequence[str]
    #: Names of `ARMS`; plain SGD is measured in any case.
    methods: Sequence[str] = tuple(arms.ARMS)
    #: Physical batch size by model; the others use the task's.
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    #: Also measure other projects' implementations.
    peers: bool = False
    rounds: int = 15
    #: Length of a turn in seconds.
    seconds: float = 0.3
    #: Also find each compiled arm's largest batch that fits into this many bytes; None skips the search.
    memory_limit: float | None = None
    #: Directory to write `clipping.json` and `clipping.md` to after every model.
    to: Path | None = None
    #: The command line, to be recorded.
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        _known("--models", self.models, TASKS)
        _known("--methods", self.methods, arms.ARMS)
        for model, size in self.batches.items():
            _known("--batch", [model], TASKS)
            if size < 1:
                raise InputError("--batch", size, "give at least 1 example.")
        if self.rounds < 1:
            raise InputError("--rounds", self.rounds, "give at least 1.")
        if not self.seconds >= 0:
            raise InputError("--seconds", self.seconds, "give 0 (one call a turn) or more.")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise InputError("--memory", self.memory_limit / 2**30, "give a number of GiB above 0.")


def _known(flag: str, names: Sequence[str], choices: Mapping[str, Any]) -> None:
    if not names:
        raise InputError(flag, "", f"name at least one of {', '.join(choices)}.")
    for name in names:
        if name not in choices:
            raise InputError(flag, name, f"there are {', '.join(choices)}.")


def _to_stderr(line: str) -> None:
    print(f"dpdist: {line}", file=sys.stderr, flush=True)


def _named(progress: Progress, model: str, line: str) -> None:
    progress(f"{model}: {line}")


def bench_clipping(request: Request, *, progress: Progress = _to_stderr) -> dict[str, Any]:
    """Measure all models of the request, one after the other; return the content of `clipping.json`.

    Raises:
        InputError: peers are requested but not installed.
    """
    measured = arms_of(request)
    names = {arm.name for arm in measured} | set(request.methods)
    about = {name: text for name, text in {**arms.ARMS, **peers.PEERS}.items() if name in names}
    content: dict[str, Any] = {
        "what": "the gradient sum of one physical batch, by every arm; ratios are to the same framework's plain SGD",
        "command": list(request.command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"rounds": request.rounds, "seconds_a_turn": request.seconds, "memory_limit": request.memory_limit},
        "machine": machine.this_machine(),
        "versions": machine.all_versions(peers=request.peers),
        "about": about,
        "absent": dict(peers.ABSENT) if request.peers else {},
        "models": {},
    }
    with _without_compilation_cache():
        for name in dict.fromkeys(request.models):
            task = TASKS[name]
            size = request.batches.get(name, task.batch)
            content["models"][name] = measure(
                task,
                size,
                measured,
                naive=arms.NAIVE in request.methods,
                rounds=request.rounds,
                seconds=request.seconds,
                memory_limit=request.memory_limit,
                progress=partial(_named, progress, name),
            )
            content["written"] = datetime.now(UTC).isoformat(timespec="seconds")
            if request.to is not None:  # after every model: the next may take an hour, or run out of memory
                request.to.mkdir(parents=True, exist_ok=True)
                write_atomically(request.to / "clipping.json", json.dumps(content, indent=2) + "\n")
                write_atomically(request.to / "clipping.md", table.text(content))
    return content


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Disable the compilation cache, which would falsify the compile times."""
    earlier = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined, unused-ignore]  # JAX 0.12 has it
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once in a process whether the cache is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", earlier)
        compilation_cache.reset_cache()


def arms_of(request: Request) -> list[Arm]:
    """Return the arms to measure in turns, always with plain SGD, the baseline."""
    found = [arms.jax_arm(name) for name in arms.ARMS if name == arms.SGD or name in request.methods]
    found = [arm for arm in found if arm.name != arms.NAIVE]
    return found + (peers.peer_arms() if request.peers else [])


def measure(
    task: Task,
    size: int,
    measured: Sequence[Arm],
    *,
    naive: bool,
    rounds: int,
    seconds: float,
    memory_limit: float | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measure all arms on one model; return its batch, its parameter count and every arm's numbers or error."""
    load = os.getloadavg()[0]
    problem = problem_of(task, size)
    programs, results = _prepare(problem, measured, progress)
    times = interleaved(
        {name: program.run for name, program in programs.items()},
        rounds=rounds,
        seconds=seconds,
        clock=clock,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    baselines = {arm.framework: times[arm.name] for arm in measured if not arm.private and arm.name in times}
    for arm in measured:
        if arm.name not in times:
            continue
        own = times[arm.name]
        median = float(np.median(own))
        results[arm.name] |= {"seconds": median, "examples_per_second": size / median, "seconds_by_round": own}
        if arm.framework in baselines:
            results[arm.name] |= ratios(own, baselines[arm.framework])
        compile_at = programs[arm.name].compile_at
        if memory_limit is not None and compile_at is not None:
            progress(f"{arm.name}: looking for its largest batch")
            results[arm.name]["largest_batch"] = largest_batch(compile_at, limit=memory_limit, start=size)
    if naive:
        progress(f"{arms.NAIVE}: a series that compiles")
        found: dict[str, Any] = {"framework": arms.JAX, "private": True}
        try:
            found |= naive_series(arms.grad_sum("per_example", problem), problem, clock=clock)
            found["ratio"] = found["seconds"] / float(np.median(baselines[arms.JAX]))
        except Exception as error:
            found["failed"] = _reason(error)
        results[arms.NAIVE] = found
    return {
        "batch": size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "load_before": load,
        "arms": results,
    }


def _prepare(
    problem: Problem, measured: Sequence[Arm], progress: Progress
) -> tuple[dict[str, Program], dict[str, dict[str, Any]]]:
    """Compile every arm, run it once and compare its sum with the reference; record the error of an arm that fails."""
    programs: dict[str, Program] = {}
    results: dict[str, dict[str, Any]] = {
        arm.name: {"framework": arm.framework, "private": arm.private} for arm in measured
    }
    references: dict[bool, Sums] = {}
    # The reference method first: the others are compared with it, and only its sums need to be kept.
    for arm in sorted(measured, key=lambda arm: arm.name != "per_example"):
        try:
            program = arm.prepare(problem)
            sums = program.read(program.run())
        except Exception as error:  # a model that an arm cannot run is a result too
            results[arm.name]["failed"] = _reason(error)
            progress(f"{arm.name}: {results[arm.name]['failed']}")
            continue
        programs[arm.name] = program
        results[arm.name]["difference"] = distance(sums, references.setdefault(arm.private, sums))
        if program.compiled is not None:
            results[arm.name] |= {
                "compile_seconds": program.compiled.seconds,
                "temp_bytes": program.compiled.temp_bytes,
                "memory_bytes": program.compiled.memory,
                "flops": program.compiled.flops,
            }
            progress(f"{arm.name}: compiled in {program.compiled.seconds:.1f} s")
    if arms.SGD not in programs:
        raise RuntimeError(f"plain SGD does not run: {results[arms.SGD]['failed']}")
    return programs, results


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def distance(sums: Sums, reference: Sums) -> float:
    """Return the L2 distance over all parameters together, relative to the reference's norm."""
    apart = sum(float(np.sum(np.square(sums[path] - reference[path], dtype=np.float64))) for path in reference)
    whole = sum(float(np.sum(np.square(reference[path], dtype=np.float64))) for path in reference)
    return float(np.sqrt(apart / whole)) if whole else float(np.sqrt(apart))
