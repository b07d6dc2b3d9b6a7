"""Several processes on this machine: a laptop that plays a cluster of one-process nodes.

Each process is told who it is through DPDIST_* variables (`dpdist.cluster.environment`). Their output is forwarded line
by line with the rank in front, and copied into the run directory. The first failure ends them all, and a signal to the
launcher becomes the preemption notice that SLURM would send.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from dpdist.cluster.environment import LOCAL_VARIABLES, free_port
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.run.layout import RunPaths
from dpdist_launch.noise import is_noise
from dpdist_launch.ranks import PYTHON, final_summary, outdated_summary, rank_environment

#: The command of a rank that trains.
DPDIST = (*PYTHON, "-m", "dpdist_launch")
EXIT_FAILED = 1
#: A run that was preempted and saved exits with it: start me again.
EXIT_PREEMPTED = 75
#: Seconds that the others get, after one has failed, to report their own side of it.
GRACE = 3.0
#: Lines that are kept for the log until the run directory is there.
_EARLY_LINES = 1000
#: Seconds to wait for the last lines of a pipe that a grandchild may hold open for ever.
_DRAIN = 2.0
#: `prctl` option of Linux: the signal a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def train_local(config: Config, argv: Sequence[str], processes: int, *, program: Sequence[str] = DPDIST) -> int:
    """Train `config` in `processes` processes of this machine; call it from the main thread.

    Args:
        argv: the arguments of `dpdist` that give each rank the same config.

    Returns:
        What `run_local` returns; but 1 where all ranks returned 0 and `summary.json` does not say that the run ended.

    Raises:
        InputError: `processes` is less than 1.
    """
    outdated = outdated_summary(config)
    log = RunPaths(Path(config.run.dir).absolute()).output
    code = run_local(argv, processes, config.cluster.devices_per_process, program=program, log=log)
    if code == 0 and final_summary(Path(config.run.dir), outdated) is None:
        print(
            f"launcher: all {processes} ranks returned 0, but {config.run.dir}/summary.json does not say that this run "
            f"has ended: {' '.join(program)} seems to run something other than dpdist",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return code


def run_local(
    argv: Sequence[str],
    processes: int,
    devices_per_process: int | None,
    environ: Mapping[str, str] | None = None,
    *,
    program: Sequence[str] = DPDIST,
    log: Path | None = None,
) -> int:
    """Run `program` with `argv` as `processes` processes of one job; call it from the main thread.

    SIGTERM and SIGINT are forwarded to all of them as SIGTERM, the preemption notice; a second SIGINT kills
    them. If this process is killed, so are they (on Linux).

    Args:
        argv: arguments after the program, such as `["train", "config.yaml"]`.
        devices_per_process: CPU devices that the config gives each, used to share out the cores.
        environ: their environment before our additions; None is this process's.
        program: the command that every process runs.
        log: a file for a copy of the output, with libraries' noise, once its folder is there: the ranks make it.

    Returns:
        0 if all returned 0; 75 if all returned 0 or 75; else the code of the first process that failed, or
        128 + the number of the signal that ended it; 130 after a second SIGINT.

    Raises:
        InputError: `processes` is less than 1.
    """
    code, _ = _run(argv, processes, devices_per_process, environ, program, log)
    return code


def run_part(argv: Sequence[str], processes: int, devices_per_process: int | None, *, program: Sequence[str]) -> int:
    """`run_local` of a job after which the caller goes on to others.

    Raises:
        KeyboardInterrupt: this process was told to stop, by SIGINT or SIGTERM; also where the job was so near its end
            that it ended well.
        InputError: `processes` is less than 1.
    """
    code, told = _run(argv, processes, devices_per_process, None, program, None)
    if told:
        raise KeyboardInterrupt
    return code


def _run(
    argv: Sequence[str],
    processes: int,
    devices_per_process: int | None,
    environ: Mapping[str, str] | None,
    program: Sequence[str],
    log: Path | None,
) -> tuple[int, list[int]]:
    """The code of the job, and the signals that this process got meanwhile."""
    if processes < 1:
        raise InputError("--processes", processes, "give at least 1.")
    environ = rank_environment(os.environ if environ is None else environ)
    environ = _with_fair_share_of_cores(environ, processes * (devices_per_process or 1))
    if log is not None:
        environ["DPDIST_LOG"] = str(log)
    coordinator = f"127.0.0.1:{free_port()}"
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarded_signals(ranks) as received:
            for rank in range(processes):
                identity = dict(zip(LOCAL_VARIABLES, (str(rank), str(processes), coordinator), strict=True))
                ranks.append(_start([*program, *argv], {**environ, **identity}))
            if received:  # While some ranks were not there yet.
                _notify(ranks)
            # Threads only from here on: _start forks, and a fork copies locks that another thread may hold.
            forwarders = _forward_output(ranks, Copy(log))
            code = _supervise(ranks, received)
        for thread in forwarders:
            thread.join(_DRAIN)
    finally:
        _kill(ranks)
    return (128 + signal.SIGINT if received.count(signal.SIGINT) > 1 else code), received


def _with_fair_share_of_cores(environ: Mapping[str, str], devices: int) -> dict[str, str]:
    """`environ`, and one thread of BLAS for each process where the devices of all outnumber the cores.

    BLAS starts a thread for every core in every process, which then fight for them. XLA's pool keeps its size, which
    decides bits (see `dpdist.cluster.join.POOL_THREADS`). What the user has set stays.
    """
    environ = dict(environ)
    if devices > (os.cpu_count() or 1):
        environ.setdefault("OMP_NUM_THREADS", "1")
    return environ


def _start(command: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        # A forwarded line must be a line that was printed now, not 8 KiB later.
        env={**environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Out of the terminal's foreground group: Ctrl-C comes to the launcher alone, which asks to save.
        process_group=0,
        preexec_fn=die_with(os.getpid()),
    )


def die_with(launcher: int) -> Callable[[], None] | None:
    """What a child does between fork and exec so that it never outlives the launcher."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # Looked up before the fork: the loader takes locks.

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != launcher:  # It died before prctl could tell.
            os._exit(128 + signal.SIGKILL)

    return set_death_signal


class Copy:
    """A copy of the output in a file of the owner's alone; what fails is left out, as the terminal has it all.

    Args:
        path: None copies nothing. The folder is not made here: ranks refuse a directory that holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._early: list[str] = []
        self._file: IO[str] | None = None

    def write(self, line: str) -> None:
        """Add a line, or keep it until the folder is there."""
        if self._path is None:
            return
        with suppress(OSError):
            if self._file is None and self._path.parent.is_dir():
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._file = os.fdopen(descriptor, "a", buffering=1)
                self._file.writelines(self._early)
            if self._file is not None:
                self._file.write(line)
            elif len(self._early) < _EARLY_LINES:
                self._early.append(line)


def _forward_output(ranks: list[subprocess.Popen[bytes]], copy: Copy) -> list[threading.Thread]:
    """Start a thread for each pipe, which copies whole lines, one at a time, to our own stream."""
    lock = threading.Lock()

    def forward(rank: int, pipe: IO[bytes], stream: IO[str]) -> None:
        with pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip("\n")
                with lock:
                    copy.write(f"[{rank}] {text}\n")
                if is_noise(text):
                    continue
                # Our reader may be gone (`| head`). The ranks' pipes are emptied all the same, or they would stall.
                with lock, suppress(BrokenPipeError):
                    stream.write(f"[{rank}] {text}\n")
                    stream.flush()

    threads = []
    for rank, process in enumerate(ranks):
        for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            threads.append(threading.Thread(target=forward, args=(rank, pipe, stream), daemon=True))
            threads[-1].start()
    return threads


@contextmanager
def _forwarded_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """While the block runs, SIGTERM and SIGINT go to the ranks; yields the signals received so far."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            _kill(ranks)
            return
        _notify(ranks)
        # No print: the interrupted code may be holding the lock of the stream's buffer.
        hint = b"; Ctrl-C again ends them at once" if number == signal.SIGINT else b""
        os.write(2, b"launcher: asked all ranks to save and stop" + hint + b"\n")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _notify(ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, the preemption notice, to every rank; nothing to one that has ended."""
    for process in ranks:
        process.send_signal(signal.SIGTERM)


def _supervise(ranks: list[subprocess.Popen[bytes]], told: list[int]) -> int:
    """Wait for all ranks, end them when one fails, and return the code of the job; `told` are the signals we got."""
    # One waiting thread a rank, so that failures queue up in the order in which they happened: when the
    # coordinator dies the others abort within milliseconds, and it is the first that must be named.
    exits: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, process in enumerate(ranks):
        threading.Thread(
            target=lambda rank, process: exits.put((rank, process.wait())), args=(rank, process), daemon=True
        ).start()
    job_code, failed, deadline = 0, False, float("inf")
    for _ in ranks:
        try:
            rank, code = exits.get(timeout=max(0.0, deadline - time.monotonic()) if failed else None)
        except queue.Empty:
            # Not SIGTERM: JAX takes that for a preemption notice, and a stuck rank would never see it.
            _kill(ranks)
            rank, code = exits.get()
        if code == EXIT_PREEMPTED and not failed:
            job_code = EXIT_PREEMPTED
        elif code not in (0, EXIT_PREEMPTED) and not failed:
            failed, deadline = True, time.monotonic() + GRACE
            job_code = code if code > 0 else 128 - code
            how = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
            if told and code == -signal.SIGTERM:
                how = "had not begun to train, so there was nothing to save"
            print(f"launcher: rank {rank} of {len(ranks)} {how}; ending the others", file=sys.stderr, flush=True)
    return job_code


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL to every rank that still runs, and to the workers it started."""
    for process in ranks:
        # poll says None too while the thread that waits for the rank is collecting it.
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
