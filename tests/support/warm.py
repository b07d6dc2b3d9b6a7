"""A Python that has imported all of dpdist, has started no JAX backend, and forks children that run things.

It reads one JSON command a line. `start` forks a child that runs the `dpdist` command with `argv`, or calls a
function of this module and leaves what it returns at `result`; `wait` tells how a child ended. WARM_IMPORTS, in the
environment, names further modules to import once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import flax.nnx  # noqa: F401 - imported once here instead of in every child
import forks
import jax
import numpy as np
import userland
from safetensors.numpy import save_file

import dpdist
import dpdist.run.resume
import dpdist_launch.cli
import dpdist_launch.training
from dpdist.cluster.lease import Lease
from dpdist.data import open_dataset, read_rows
from dpdist.mechanism.ledger import Ledger
from dpdist.mechanism.step import StepPrograms
from dpdist.models import vit
from dpdist.run import integrity
from dpdist.run.checkpoint import Checkpoints, SaveFailedError
from dpdist.run.directory import RunDirectory
from dpdist.run.metrics import Publisher
from dpdist.run.recorder import Recorder


def train_all(configs: list[dict[str, Any]]) -> list[Any]:
    """Summaries of several runs, one after the other; an `InputError` shows as its three parts."""
    results: list[Any] = []
    for config in configs:
        try:
            results.append(dpdist.train(dpdist.from_dict(config)))
        except dpdist.InputError as error:
            results.append([error.field, str(error.value), error.remedy])
    return results


def train_after_using_jax(config: dict[str, Any]) -> Any:
    """As in a notebook, where JAX has long made its one device."""
    jax.devices()
    return train_all([config])[0]


def load(runs: dict[str, str], to: str) -> dict[str, Any]:
    """What `TrainedRun` says of every run, and its parameters by name in `to`/NAME.npz."""
    told = {}
    for name, directory in runs.items():
        run = dpdist.load(directory)
        leaves = jax.tree_util.tree_leaves_with_path(run.params)
        keys = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        np.savez(Path(to) / f"{name}.npz", **dict(zip(keys, (leaf for _, leaf in leaves), strict=True)))
        test = open_dataset(run.config.data).test
        examples = userland.test_columns() if test is None else read_rows(test, np.arange(len(test)))
        logits = run.predict({"image": examples["image"]})
        told[name] = {
            "step": run.step,
            "privacy": run.privacy,
            "shape": list(logits.shape),
            "accuracy": float(np.mean(np.argmax(logits, axis=-1) == examples["label"])),
        }
    return told


def save_vit(options: dict[str, Any], to: str) -> None:
    """Random weights for 8x8 images and ten classes, in the file form that `pretrained` reads."""
    example = {"image": jax.ShapeDtypeStruct((8, 8, 1), np.uint8)}
    shapes = jax.eval_shape(vit.vit(example=example, classes=10, **options).init, jax.random.key(0))
    naming, draw = vit.naming(options["depth"], options["patch"], 1), np.random.default_rng(0)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        theirs, layout = naming.tensors[jax.tree_util.keystr(path, simple=True, separator=".")]
        tensors[theirs] = draw.normal(size=layout.shape(leaf.shape)).astype(np.float32)
    save_file(tensors, to)


def parameters(run: str, steps: list[int], to: str) -> None:
    """The parameters after so many steps, one array a name, in `to`/STEP.npz."""
    for step in steps:
        np.savez(
            Path(to) / f"{step}.npz",
            **integrity.read_state(Path(run) / "checkpoints" / str(step) / integrity.STATE)["params"],
        )


def reseal(path: str, content: dict[str, Any]) -> None:
    """Write the JSON part of a checkpoint, made to look whole."""
    digests = (integrity.META_DIGEST,)
    plain = {name: value for name, value in content.items() if name not in digests}
    Path(path).write_text(json.dumps(plain | {integrity.META_DIGEST: integrity.json_digest(plain)}))


def train_unprotected(config: dict[str, Any]) -> Any:
    """A run that takes changed settings for unchanged ones: what incarnations are there to prevent."""
    dpdist.run.resume.reasons_for_new_incarnation = lambda *_, **__: []
    return dpdist.train(dpdist.from_dict(config))


def count_compilations(config: dict[str, Any]) -> dict[str, Any]:
    """How many programs were compiled when each step had been dispatched, and when the last was recorded."""
    compiled: list[str] = []
    counts: list[int] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.config.update("jax_enable_compilation_cache", False)
    jax.monitoring.register_event_duration_secs_listener(listen)
    step_done, flush = Recorder.step_done, Recorder.flush

    def counting_step_done(self: Recorder, *arguments: Any) -> None:
        step_done(self, *arguments)
        counts.append(len(compiled))

    def counting_flush(self: Recorder) -> None:
        flush(self)
        counts.append(len(compiled))

    Recorder.step_done, Recorder.flush = counting_step_done, counting_flush  # type: ignore[method-assign]
    summary = dpdist.train(dpdist.from_dict(config))
    return {"counts": counts, "summary": summary}


def order_of_events(config: dict[str, Any]) -> list[list[Any]]:
    """What a run does in the order that its guarantee needs, on a disk that commits a save after the next step.

    `lease` (checked), `reserve` start stop, `draw` step, `apply`, `save` step, `saved` and `shown` step and whether its
    checkpoint was committed by then, `summary` status.
    """
    events: list[list[Any]] = []
    committed: set[int] = set()
    saving: list[Checkpoints] = []

    def record(owner: Any, name: str, event: Callable[..., list[Any]]) -> None:
        wrapped = getattr(owner, name)

        def wrapper(self: Any, *arguments: Any) -> Any:
            events.append(event(*arguments))
            return wrapped(self, *arguments)

        setattr(owner, name, wrapper)

    synchronise = Checkpoints.synchronise

    def slow_synchronise(self: Checkpoints, step: int) -> None:
        saving.append(self)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and events.count(["apply"]) <= step:
            time.sleep(0.01)
        synchronise(self, step)
        committed.add(step)

    def draw(keys: Any, step: int) -> list[Any]:
        if (step + 2) % config["checkpoint"]["every_steps"] == 0:
            saving[-1].busy(30)  # after this step comes the last chance to publish the save before the next one begins
        return ["draw", step]

    Checkpoints.synchronise = slow_synchronise  # type: ignore[method-assign]
    record(Lease, "check", lambda: ["lease"])
    record(Ledger, "reserve", lambda start, stop: ["reserve", start, stop])
    record(StepPrograms, "draw", draw)
    record(StepPrograms, "apply", lambda *_: ["apply"])
    record(Checkpoints, "save", lambda step, *_: ["save", step])
    record(Ledger, "record_saved", lambda step: ["saved", step, step in committed])
    record(Publisher, "release", lambda step: ["shown", step, step in committed])
    record(RunDirectory, "write_summary", lambda summary: ["summary", summary["status"]])
    dpdist.train(dpdist.from_dict(config))
    return events


def limit_of_core_files(config: dict[str, Any]) -> dict[str, list[int]]:
    """The soft and hard limit before and after a run, where the shell has allowed core files of any size."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    before = list(resource.getrlimit(resource.RLIMIT_CORE))
    dpdist.train(dpdist.from_dict(config))
    return {"before": before, "after": list(resource.getrlimit(resource.RLIMIT_CORE))}


def fail_once_evaluated(config: dict[str, Any], step: int) -> dict[str, Any]:
    """A run whose disk fails while it commits `step`, once that step was evaluated: every accuracy that was measured,
    and the error's type.
    """
    measured: list[list[Any]] = []
    done = threading.Event()
    evaluated, synchronise = Recorder.evaluated, Checkpoints.synchronise

    def watched(self: Recorder, at: int, accuracy: float) -> None:
        measured.append([at, accuracy])
        evaluated(self, at, accuracy)
        if at == step:
            done.set()

    def failing(self: Checkpoints, at: int) -> None:
        if at != step:
            return synchronise(self, at)
        done.wait(100)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Recorder.evaluated, Checkpoints.synchronise = watched, failing  # type: ignore[method-assign]
    try:
        dpdist.train(dpdist.from_dict(config))
    except SaveFailedError as error:
        return {"measured": measured, "failed": error.step}
    return {"measured": measured, "failed": None}


def script(path: str) -> str:
    """What a program prints that runs in its own folder."""
    folder = str(Path(path).parent)
    os.chdir(folder)
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def child(command: dict[str, Any]) -> NoReturn:
    """What a fork does with the rest of its life."""
    os.setpgid(0, 0)
    for descriptor, path in ((0, os.devnull), (1, command["stdout"]), (2, command["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(command["environ"])
    os.chdir(command.get("cwd", "."))
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "false":  # JAX has read its environment
        jax.config.update("jax_enable_compilation_cache", False)
    if "argv" in command:
        sys.argv = ["dpdist", *command["argv"]]
        forks.end_with(dpdist_launch.cli.main)

    def call() -> int:
        result = globals()[command["call"]](**command["keywords"])
        Path(command["result"]).write_text(json.dumps(result))
        return 0

    forks.end_with(call)


def wait(pid: int, seconds: float) -> int | None:
    """Exit code of a child; None where it did not end in time and was killed."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)


def serve() -> None:
    for name in os.environ.get("WARM_IMPORTS", "").split():
        importlib.import_module(name)
    forks.share()
    children = set()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            pid = os.fork()
            if pid == 0:
                child(command)
            children.add(pid)
            answer: int | None = pid
        else:
            children.discard(command["pid"])
            answer = wait(command["pid"], command["seconds"])
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
