"""What happened to a run: one JSON object a line in `events.jsonl`, written by process 0 and open to everyone.

An event has `time` (UTC, to the second), `event`, and the fields that `FIELDS` names, nothing else: what is not in that
table cannot get in, whoever calls. The one free text, `cause`, is what stderr shows of a failure, never what an
exception says that may quote data (`public_cause`).

A part of a run that is killed writes no last event. The next part's `resume` then says that it was `interrupted`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpdist.errors import InputError

#: Event -> its fields, all of them public: settings, counts of machines, steps, and what the summary states.
FIELDS: dict[str, dict[str, type]] = {
    "start": {"step": int, "steps": int, "nodes": int, "processes": int},
    # `after` is how the part before ended; `restarts` is how many parts of the run went before this one.
    "resume": {"step": int, "steps": int, "nodes": int, "processes": int, "restarts": int, "after": str},
    "preempted": {"step": int, "saved": bool},
    "finished": {"step": int, "status": str},
    "failed": {"step": int, "cause": str},
}
#: The events that end a part of a run.
ENDS = ("preempted", "finished", "failed")
_LONGEST_CAUSE = 500


def event_of(kind: str, **fields: Any) -> dict[str, Any]:
    """An event of now.

    Raises:
        ValueError: `fields` are not those of `FIELDS`, or of another type: such a value might depend on data.
    """
    known = FIELDS[kind]
    if fields.keys() != known.keys() or any(type(fields[name]) is not known[name] for name in known):
        raise ValueError(f"event {kind} has {sorted(fields)}, not {sorted(known)} of their types")
    if "cause" in fields:
        fields["cause"] = " ".join(fields["cause"].split())[:_LONGEST_CAUSE]
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, **fields}


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Add an event, durably; a line that a crash has torn is closed first."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, ("\n" * torn + json.dumps(event) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The events, oldest first; lines that are no events are left out. Empty where there is no file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [event for line in lines if (event := _parsed(line)) is not None]


def restarts(events: list[dict[str, Any]]) -> int:
    """How many times the run was started again."""
    return sum(event["event"] == "resume" for event in events)


def how_it_ended(events: list[dict[str, Any]]) -> str:
    """How the newest part ended: one of `ENDS`, or `interrupted` where it did not say."""
    last = events[-1]["event"] if events else ""
    return last if last in ENDS else "interrupted"


def public_cause(error: BaseException, *, ours: tuple[type[BaseException], ...] = ()) -> str:
    """What everyone may read of a failure: the text of an error of ours, of any other the type alone.

    Args:
        ours: errors beside `InputError` whose texts are dpdist's own, about files and processes.
    """
    if isinstance(error, (InputError, *ours)):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return f"{kind} ({os.strerror(error.errno)})"  # the system's words; `strerror` is whatever it was made with
    return kind


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), str)
    return event if whole else None
