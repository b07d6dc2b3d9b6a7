"""The trials of a search on this machine, some side by side; each is a `dpdist train` of its own.

What they print goes to files under `private/`. They never outlive this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from dpdist.errors import InputError
from dpdist_launch.local import DPDIST, EXIT_PREEMPTED, die_with
from dpdist_launch.ranks import rank_environment
from dpdist_launch.tune.search import Search, Trial

#: Seconds between two looks at the trials.
_POLL = 0.1
_EXIT_BAD_INPUT = 2


def run_here(search: Search, *, at_once: int, processes: int | None, searching: Callable[[], None]) -> bool:
    """Run the trials that are left; returns False where a signal asked to save and stop, and they have.

    Args:
        at_once: how many run side by side at most.
        processes: of each trial; None is one, without a launcher of its own.
        searching: called again and again meanwhile.

    Raises:
        InputError: a trial was refused for bad input; the others were asked to save and stop.
    """
    running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = {}
    waiting = search.left()
    refused: Trial | None = None
    with _asked_to_stop(running) as asked:
        try:
            while running or (waiting and not asked and refused is None):
                while waiting and len(running) < at_once and not asked and refused is None:
                    trial = waiting.pop(0)
                    running[trial.name] = trial, _start(search, trial, processes)
                time.sleep(_POLL)
                searching()
                for trial, process in list(running.values()):
                    search.watch(trial)
                    if (code := process.poll()) is None:
                        continue
                    del running[trial.name]
                    if code == _EXIT_BAD_INPUT:
                        refused = refused or trial
                        _notify(running)
                    elif code not in (0, EXIT_PREEMPTED) and not asked:
                        search.note_failure(trial, f"exit code {code}")
                    if not search.over(trial):
                        waiting.append(trial)
        finally:
            for _, process in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if refused is not None:
        raise InputError(
            "CONFIG",
            str(search.question.config.run.dir),
            f"a trial was refused; the end of {_output(search, refused)} says why. Whoever reads on there is not "
            "covered by the bound of the search. Mend it and give the same command again; where that takes another "
            "config or other code, name a new --run-dir.",
        )
    return not asked


def _start(search: Search, trial: Trial, processes: int | None) -> subprocess.Popen[bytes]:
    file, output = search.begin(trial), _output(search, trial)
    output.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            [*DPDIST, "train", str(file), *([] if processes is None else ["--processes", str(processes)])],
            env=rank_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )
    finally:
        os.close(descriptor)


def _output(search: Search, trial: Trial) -> Path:
    return search.private / "output" / f"{trial.name}.log"


def _notify(running: dict[str, tuple[Trial, subprocess.Popen[bytes]]]) -> None:
    for _, process in running.values():
        process.send_signal(signal.SIGTERM)


@contextmanager
def _asked_to_stop(running: dict[str, tuple[Trial, subprocess.Popen[bytes]]]) -> Iterator[list[int]]:
    """While the block runs, SIGTERM and SIGINT ask the trials to save; a second SIGINT ends them."""
    asked: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if asked.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        _notify(running)
        os.write(2, b"dpdist: asked the search to save and stop\n")  # no print within a signal handler

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
