"""Time every method of computing a clipped gradient sum, side by side on one physical batch."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import os
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
from dpdist_launch.measure.bench.profile import profiled
from dpdist_launch.measure.bench.program import Arm, Program, Sums, largest_batch
from dpdist_launch.measure.bench.progress import Progress, to_stderr
from dpdist_launch.measure.bench.rounds import Clock, fastest, interleaved, ratios
from dpdist_launch.measure.bench.tasks import TASKS, Problem, Task, in_dtype, problem_of

TF32, FLOAT32 = "tf32", "float32"
#: Format of the products -> (dtype of the model, JAX's precision of float32 products).
FORMATS: dict[str, tuple[str, str | None]] = {
    "bf16": ("bfloat16", None),
    TF32: ("float32", None),  # the default: TF32 on GPUs that have it, float32 elsewhere
    FLOAT32: ("float32", "highest"),
}
NO_TIME = "no time left"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, and how. Construction raises InputError for a value out of range or an unknown name."""

    #: Names of `TASKS`.
    models: Sequence[str]
    #: Names of `ARMS`, in the order they are to be measured; plain SGD is the first in any case.
    methods: Sequence[str] = tuple(arms.ARMS)
    #: Physical batch size by model; the others use the task's.
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    #: The format of the models' products, of `FORMATS`.
    format: str = TF32
    #: Also measure other projects' implementations: `all`, or those `installed`.
    peers: str | None = None
    rounds: int = 15
    #: Length of a turn in seconds.
    seconds: float = 0.3
    #: Also find each compiled arm's largest batch that fits into this many bytes; None skips the search.
    memory_limit: float | None = None
    #: Compile no further arm of a model, and begin no further round, after so many seconds of it: an arm is left out if
    #: it would not be ready by then, should it take as long as the slowest before it.
    time_limit: float | None = None
    #: Also trace a few calls of each JAX arm: the time of its kernels, and with `to` the text of its compiled program.
    profile: bool = False
    #: Directory to write `clipping.json` to after every arm, and `clipping.md` after every model.
    to: Path | None = None
    #: The command line, to be recorded.
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        _known("--models", self.models, TASKS)
        _known("--methods", self.methods, arms.ARMS)
        _known("--format", [self.format], FORMATS)
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
        if self.time_limit is not None and not self.time_limit > 0:
            raise InputError("--time-limit", self.time_limit, "give a number of seconds above 0.")


def _known(flag: str, names: Sequence[str], choices: Mapping[str, Any]) -> None:
    if not names:
        raise InputError(flag, "", f"name at least one of {', '.join(choices)}.")
    for name in names:
        if name not in choices:
            raise InputError(flag, name, f"there are {', '.join(choices)}.")


def _named(progress: Progress, model: str, line: str) -> None:
    progress(f"{model}: {line}")


def bench_clipping(request: Request, *, progress: Progress = to_stderr) -> dict[str, Any]:
    """Measure all models of the request, one after the other; return the content of `clipping.json`.

    Raises:
        InputError: peers are requested but not installed.
    """
    measured = arms_of(request)
    names = {arm.name for arm in measured} | set(request.methods)
    about = {name: text for name, text in {**arms.ARMS, **peers.PEERS}.items() if name in names}
    content: dict[str, Any] = {
        "what": "the gradient sum of one physical batch, by every arm; ratios are to the framework's fastest plain SGD",
        "command": list(request.command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "format": request.format,
            "rounds": request.rounds,
            "seconds_a_turn": request.seconds,
            "memory_limit": request.memory_limit,
            "time_limit": request.time_limit,
        },
        "machine": machine.this_machine(),
        "versions": machine.all_versions(peers=request.peers is not None),
        "about": about,
        "absent": dict(peers.ABSENT) if request.peers else {},
        "models": {},
    }
    dtype, precision = FORMATS[request.format]
    with _without_compilation_cache(), jax.default_matmul_precision(precision):
        for name in dict.fromkeys(request.models):
            task = in_dtype(TASKS[name], dtype)
            size = request.batches.get(name, task.batch)
            content["models"][name] = measure(
                task,
                size,
                measured,
                naive=arms.NAIVE in request.methods,
                rounds=request.rounds,
                seconds=request.seconds,
                memory_limit=request.memory_limit,
                time_limit=request.time_limit,
                profile=partial(_profile, request.to, name) if request.profile else None,
                progress=partial(_named, progress, name),
                after_arm=partial(_write, request.to, content, name),
            )
            _write(request.to, content, name, content["models"][name])
            if request.to is not None:
                write_atomically(request.to / "clipping.md", table.text(content))
    return content


def _write(to: Path | None, content: dict[str, Any], model: str, found: dict[str, Any]) -> None:
    """Write what is known so far: what comes next may take an hour, be cut off, or run out of memory."""
    content["models"][model] = found
    content["written"] = datetime.now(UTC).isoformat(timespec="seconds")
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        write_atomically(to / "clipping.json", json.dumps(content, indent=2) + "\n")


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
    """Return the arms to measure in turns: first plain SGD, the baseline, then in the order they were asked for."""
    names = dict.fromkeys((arms.SGD, *request.methods))
    found = [arms.jax_arm(name) for name in names if name != arms.NAIVE]
    return found + (peers.peer_arms(installed=request.peers == "installed") if request.peers else [])


def measure(
    task: Task,
    size: int,
    measured: Sequence[Arm],
    *,
    naive: bool,
    rounds: int,
    seconds: float,
    memory_limit: float | None = None,
    time_limit: float | None = None,
    profile: Callable[[str, Program], dict[str, Any]] | None = None,
    clock: Clock = time.perf_counter,
    processor_clock: Clock = time.process_time,
    progress: Progress = lambda line: None,
    after_arm: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure all arms on one model; return its batch, its parameter count and every arm's numbers or error."""
    load = os.getloadavg()[0]
    until = math.inf if time_limit is None else clock() + time_limit
    problem = problem_of(task, size)
    found: dict[str, Any] = {
        "batch": size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "load_before": load,
        "arms": {arm.name: {"framework": arm.framework, "private": arm.private} for arm in measured},
    }
    results = found["arms"]
    programs = _prepare(problem, measured, results, until, clock, progress, lambda: after_arm(found))
    times = interleaved(
        {name: program.run for name, program in programs.items()},
        rounds=rounds,
        seconds=seconds,
        clock=clock,
        processor=processor_clock,
        until=until,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    wall = {name: each.wall for name, each in times.items()}
    processor = {name: each.processor for name, each in times.items()}
    found["baselines"] = baselines = baselines_of(measured, wall)
    found["processor_baselines"] = by_processor = baselines_of(measured, processor)
    for arm in measured:
        if arm.name not in times:
            continue
        own, spent = wall[arm.name], processor[arm.name]
        median = float(np.median(own))
        results[arm.name] |= {"seconds": median, "examples_per_second": size / median, "seconds_by_round": own}
        results[arm.name] |= {"processor_seconds": float(np.median(spent)), "processor_seconds_by_round": spent}
        if arm.framework in baselines:
            results[arm.name] |= ratios(own, wall[baselines[arm.framework]])
            results[arm.name]["processor_ratio"] = ratios(spent, processor[by_processor[arm.framework]])["ratio"]
        compile_at = programs[arm.name].compile_at
        if memory_limit is not None and compile_at is not None and clock() < until:
            progress(f"{arm.name}: looking for its largest batch")
            results[arm.name]["largest_batch"] = largest_batch(compile_at, limit=memory_limit, start=size)
    for arm in measured:
        if profile is not None and arm.name in times and arm.framework == arms.JAX and clock() < until:
            after_arm(found)  # the profiler is another's code: what is known is kept, whatever it does
            progress(f"{arm.name}: its kernels")
            results[arm.name]["profile"] = profile(arm.name, programs[arm.name])
    if naive:
        progress(f"{arms.NAIVE}: a series that compiles")
        series: dict[str, Any] = {"framework": arms.JAX, "private": True}
        try:
            series |= naive_series(arms.grad_sum(arms.NAIVE, problem), problem, clock=clock)
            series["ratio"] = series["seconds"] / float(np.median(wall[baselines[arms.JAX]]))
        except Exception as error:
            series["failed"] = _reason(error)
        results[arms.NAIVE] = series
    return found


def baselines_of(measured: Sequence[Arm], times: Mapping[str, list[float]]) -> dict[str, str]:
    """Return the name of the fastest plain SGD by framework: a ratio to a slow one would flatter."""
    plain: dict[str, dict[str, list[float]]] = {}
    for arm in measured:
        if not arm.private and arm.name in times:
            plain.setdefault(arm.framework, {})[arm.name] = times[arm.name]
    return {framework: fastest(forms) for framework, forms in plain.items()}


def _prepare(
    problem: Problem,
    measured: Sequence[Arm],
    results: dict[str, dict[str, Any]],
    until: float,
    clock: Clock,
    progress: Progress,
    after_arm: Callable[[], None],
) -> dict[str, Program]:
    """Compile every arm, run it twice and compare its sum with the reference; what is found goes into `results`.

    An arm that fails, or would not be ready by `until`, gets `failed` there.
    """
    programs: dict[str, Program] = {}
    references: dict[bool, Sums] = {}
    spent: list[tuple[str, float]] = []  # the framework and the seconds of each arm so far
    for arm in _in_order(measured, hurry=until < math.inf):
        result, began = results[arm.name], clock()
        if spent and began + _expected(arm, spent) >= until:
            result["failed"] = NO_TIME
            continue
        try:
            program = arm.prepare(problem)
            before = _peak_bytes()
            sums = program.read(program.run())
            peak = _peak_bytes()
        except Exception as error:  # a model that an arm cannot run is a result too
            result["failed"] = _reason(error)
            progress(f"{arm.name}: {result['failed']}")
            continue
        programs[arm.name] = program
        result["difference"] = distance(sums, references.setdefault(arm.private, sums))
        if peak is not None and peak > (before or 0):  # otherwise an earlier arm, or compiling, needed as much
            result["peak_bytes"] = peak
        if program.compiled is not None:
            result |= {
                "compile_seconds": program.compiled.seconds,
                "temp_bytes": program.compiled.temp_bytes,
                "memory_bytes": program.compiled.memory,
                "flops": program.compiled.flops,
            }
            progress(f"{arm.name}: compiled in {program.compiled.seconds:.1f} s")
        called = clock()
        program.run()
        result["second_call_seconds"] = clock() - called
        spent.append((arm.framework, clock() - began))
        after_arm()
    if arms.SGD not in programs:
        raise RuntimeError(f"plain SGD does not run: {results[arms.SGD]['failed']}")
    return programs


def _expected(arm: Arm, spent: Sequence[tuple[str, float]]) -> float:
    """Seconds until an arm is ready: of its framework's slowest; of a new framework's first, the quickest of all."""
    alike = [seconds for framework, seconds in spent if framework == arm.framework]
    return max(alike) if alike else min(seconds for _, seconds in spent)


def _in_order(measured: Sequence[Arm], *, hurry: bool) -> list[Arm]:
    """Return the arms as they are prepared: the reference method first, since the others are compared with it.

    In a hurry, it must not cost us arms that matter more: then plain SGD and the first method, then the arms of
    PyTorch, which are ready in seconds, then the others in the order they were asked for.
    """
    if not hurry:
        return sorted(measured, key=lambda arm: arm.name != "per_example")
    return [*measured[:2], *sorted(measured[2:], key=lambda arm: arm.framework == arms.JAX)]


def _profile(to: Path | None, model: str, name: str, program: Program) -> dict[str, Any]:
    """Return the arm's kernels; writes its compiled program beside the results."""
    try:
        if to is not None and program.text is not None:
            text = to / "programs" / f"{model}-{name}.hlo.gz"
            text.parent.mkdir(exist_ok=True)
            text.write_bytes(gzip.compress(program.text().encode()))
        return profiled(program.run)
    except Exception as error:  # a device that cannot be traced must not cost the times
        return {"failed": _reason(error)}


def _peak_bytes() -> int | None:
    """Return the most device memory that this process has used so far; None where the device does not count."""
    peak: int | None = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def distance(sums: Sums, reference: Sums) -> float:
    """Return the L2 distance over all parameters together, relative to the reference's norm."""
    apart = sum(float(np.sum(np.square(sums[path] - reference[path], dtype=np.float64))) for path in reference)
    whole = sum(float(np.sum(np.square(reference[path], dtype=np.float64))) for path in reference)
    return float(np.sqrt(apart / whole)) if whole else float(np.sqrt(apart))
