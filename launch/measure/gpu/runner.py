"""Run steps one after the other within a time budget, and write all that is known after each of them.

Only Python's own library is imported here: where JAX or a GPU is missing, the page says so. Each step is a process of
its own under `timeout`, so that its memory on the device is free for the next, and none outlives its time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OK, FAILED, CUT_OFF, NO_TIME, SKIPPED, RUNNING = "ok", "failed", "cut off", "no time left", "skipped", "running"
NOT_REACHED = "not reached"
#: With less than this many seconds left, no step begins.
LEAST = 8.0
#: What writing the results may take at the end.
_RESERVE = 2.0


class Skip(Exception):  # noqa: N818  # not an error: the step has nothing to do here
    """A step has nothing to do on this device; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may look at to choose its command."""

    #: The directory for its files.
    out: Path
    tiny: bool
    #: Seconds that it has.
    seconds: float
    #: The results of the steps before it, by name.
    results: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process whose result is a JSON file."""

    name: str
    #: Its part of the budget in seconds, at ten minutes for all.
    limit: float
    #: Returns the command line; raises Skip.
    command: Callable[[Context], Sequence[str]]
    #: The file below the output directory that the command writes, also while it goes on.
    result: str
    environment: Mapping[str, str] = field(default_factory=dict)
    #: The result in a line; without it, the last line that the command printed.
    summary: Callable[[Any], str] | None = None


def run(
    steps: Sequence[Step],
    *,
    out: Path,
    seconds: float,
    tiny: bool = False,
    about: Mapping[str, Any] | None = None,
    write_page: Callable[[dict[str, Any]], str] = lambda content: "",
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """Run the steps; returns the content of `gpu.json`.

    Args:
        out: gets `gpu.json` and `README.md` after every step, and `logs/` with the output of each.
        seconds: budget of all steps together; their limits are scaled to it.
        write_page: makes README.md of the content.
    """
    began = time.monotonic()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        **(about or {}),
        "started": _now(),
        "budget_seconds": seconds,
        "steps": {step.name: {"status": NOT_REACHED} for step in steps},
        "results": {},
    }

    def write() -> None:
        content["written"] = _now()
        _replace(out / "gpu.json", json.dumps(content, indent=2) + "\n")
        _replace(out / "README.md", write_page(content))

    for step in steps:
        told = content["steps"][step.name]
        rest = seconds - (time.monotonic() - began) - _RESERVE
        limit = min(step.limit * max(1.0, seconds / 600), rest)
        if rest < LEAST:
            told["status"] = NO_TIME
            continue
        context = Context(out=out, tiny=tiny, seconds=limit, results=content["results"])
        try:
            command = list(step.command(context))
        except Skip as why:
            told |= {"status": SKIPPED, "last_line": str(why)}
            continue
        told |= {"status": RUNNING, "limit_seconds": round(limit, 1), "command": command}
        write()
        (out / step.result).unlink(missing_ok=True)  # of an earlier run: it would pass for this step's
        try:
            told |= _run_one(step, command, limit, out)
        except BaseException:  # we were told to end
            told["status"] = CUT_OFF
            raise
        finally:
            _read(step, told, content["results"], out)
            write()
        say(f"{step.name}: {told['status']} after {told['seconds']:.0f} s: {told['last_line'][:120]}")
    write()
    return content


def _read(step: Step, told: dict[str, Any], results: dict[str, Any], out: Path) -> None:
    """Put what the step wrote, all or a part, among the results."""
    try:
        results[step.name] = json.loads((out / step.result).read_text())
        if step.summary is not None and told["status"] == OK:
            told["last_line"] = step.summary(results[step.name])
    except (OSError, ValueError) as error:
        if told["status"] == OK:
            told |= {"status": FAILED, "last_line": f"it wrote no result: {type(error).__name__}"}


def _run_one(step: Step, command: list[str], limit: float, out: Path) -> dict[str, Any]:
    printed, errors = (out / "logs" / f"{step.name}.{kind}" for kind in ("out", "err"))
    began = time.monotonic()
    with printed.open("wb") as stdout, errors.open("wb") as stderr:
        # In its own process group, which `timeout` signals as a whole: first politely, then for good.
        process = subprocess.Popen(
            ["timeout", "--kill-after=3", f"{limit:.1f}", *command],
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **step.environment},
        )
        try:
            code = process.wait()
        except BaseException:  # we were interrupted: the step must not go on without us
            process.terminate()
            process.wait()
            raise
    timed_out = code == 124 or (code in (137, -9) and time.monotonic() - began >= limit)  # a killed one: no memory?
    status = OK if code == 0 else CUT_OFF if timed_out else FAILED
    lines = _lines(printed) if status == OK else _lines(errors) or _lines(printed)
    # XLA's log, as of the signal that cut a step off, and JAX's errors at its exit: what tells stands before them.
    own = [line for line in lines if not re.match(r"[IWEF]\d{4} ", line)] or lines
    named = [line for line in own if "Error" in line]
    lines = lines if status == OK else named or own
    return {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "exit": code,
        "last_line": lines[-1][:300] if lines else "",
    }


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]


def _replace(path: Path, text: str) -> None:
    """Write so that who reads, or a cut-off, finds either the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
