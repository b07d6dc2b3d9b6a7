"""`dpdist logs`: what the ranks of a run have printed, or one of them, without the libraries' noise."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdist.errors import InputError
from dpdist.run import ranks
from dpdist.run.layout import RunPaths
from dpdist_launch.noise import is_noise
from dpdist_launch.observe import queue
from dpdist_launch.observe.snapshot import GOING_ON, is_run, job_of, look
from dpdist_launch.observe.sources import Source, find, split
from dpdist_launch.paths import path_argument

#: Seconds between two looks at the logs, and between two at the run's state.
_POLL, _STATE = 0.5, 5.0


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    logs = commands.add_parser(
        "logs",
        help="what the ranks of a run have printed, and which rank ran on which node",
        description="Print the log of the newest job in RUN, by whatever means it was started, with the rank in front "
        "of each line; the nodes of the ranks go to stderr. What libraries print in every run is left out.",
    )
    logs.add_argument("run_dir", type=path_argument, metavar="RUN")
    logs.add_argument("--rank", type=int, metavar="R", help="the lines of one rank alone")
    logs.add_argument("--follow", action="store_true", help="go on while the run does; Ctrl-C leaves it alone")
    logs.add_argument("--all-noise", action="store_true", help="also what Gloo and XLA print in every run")
    logs.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the log; with `--follow` until the run ends or Ctrl-C."""
    paths = RunPaths(options.run_dir)
    if (paths.root / "sweep.json").exists():
        raise InputError("RUN", str(paths.root), "is a sweep; name one of its points, which `dpdist status` lists.")
    if not is_run(paths.root):
        raise InputError("RUN", str(paths.root), "holds no run; `dpdist status` lists those in a folder.")
    here = ranks.read(paths.ranks)
    known = None if here is None else len(here.nodes)
    if options.rank is not None and not 0 <= options.rank < (known or sys.maxsize):
        raise InputError("--rank", options.rank, f"this run has the ranks 0 to {(known or 1) - 1}.")
    sources = find(paths)
    if not sources and not options.follow:
        raise InputError("RUN", str(paths.root), _nowhere(paths))
    _say(_map(here, options.rank))
    with contextlib.suppress(KeyboardInterrupt):
        _print(paths, sources, options)
    return 0


def _print(paths: RunPaths, sources: list[Source], options: argparse.Namespace) -> None:
    follow = _Follow(paths)
    shown: dict[Path, _Reader] = {}
    told: set[Path] = set()
    while True:
        going_on = options.follow and follow.goes_on()  # asked before the files are read: nothing is missed
        for source in sources or find(paths):
            if source.rank is not None and options.rank not in (None, source.rank):
                continue
            if source.path not in shown:
                shown[source.path] = _Reader(source.path)
                one = source.rank is None or options.rank is not None
                if (place := source.path if one else source.path.parent) not in told:  # of 80 ranks, once
                    _say(f"log: {place}")
                    told.add(place)
            for line in shown[source.path].lines(whole=going_on):
                rank, text = split(line) if source.rank is None else (source.rank, line)
                if (options.rank is None or rank == options.rank) and (options.all_noise or not is_noise(text)):
                    print(text if rank is None or options.rank is not None else f"[{rank}] {text}")
        sys.stdout.flush()
        if not going_on:
            return
        sources = []  # a job that was requeued or submitted anew may have other files
        time.sleep(_POLL)


class _Reader:
    """A file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def lines(self, *, whole: bool) -> Iterator[str]:
        """The lines since the last call; with `whole` a last one that is still being written waits for the next."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._position:  # it was written anew
                    self._position = 0
                file.seek(self._position)
                data = file.read()
        except OSError:
            return
        if whole:
            data = data[: data.rfind(b"\n") + 1]
        self._position += len(data)
        yield from data.decode(errors="replace").splitlines()


class _Follow:
    """Whether the run goes on: it is held by a process, or SLURM still has a job for it."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths, self._asked, self._goes_on = paths, -_STATE, True

    def goes_on(self) -> bool:
        if time.monotonic() - self._asked >= _STATE:
            job = job_of(self._paths)
            state = look(self._paths.root, queue.ask({job} if job else set())).state
            self._goes_on, self._asked = state in GOING_ON | {"running"}, time.monotonic()
        return self._goes_on


def _map(here: ranks.Ranks | None, rank: int | None) -> str:
    """`rank 3 = n2 local 1`: one rank, or all, a line a node."""
    if here is None:
        return "which rank runs on which node is not known (yet)"
    if rank is not None:
        return f"rank {rank} = {here.nodes[rank]} local {here.local(rank)}"
    return "\n".join(
        ", ".join(f"rank {rank} = {node} local {local}" for local, rank in enumerate(found))
        for node, found in here.by_node().items()
    )


def _nowhere(paths: RunPaths) -> str:
    job = job_of(paths)
    if job is None:
        return "has no log: what a process prints that is started by hand is on its terminal."
    return f"has no log yet, or not on this machine; `scontrol show job {job}` names that of job {job}."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
