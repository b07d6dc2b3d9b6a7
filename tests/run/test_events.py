"""`events.jsonl`: what may be in it, and what it tells after a crash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpdist.errors import InputError
from dpdist.mechanism.ledger import LedgerError
from dpdist.run import events

START = {"step": 0, "steps": 8, "nodes": 2, "processes": 4}
RESUME = START | {"step": 4, "restarts": 1, "after": "failed"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("start", START | {"loss": 0.3}),
        ("start", {"step": 0}),
        ("start", START | {"steps": 8.5}),
        ("preempted", {"step": 3, "saved": 1}),
        ("failed", {"step": 3, "cause": ["Alice"]}),
        ("finished", {"step": 3, "status": "finished", "accuracy": 0.9}),
    ],
)
def test_nothing_gets_in_that_the_table_does_not_name(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"event {kind} has"):
        events.event_of(kind, **fields)


def test_an_event_has_its_time_in_utc_and_its_fields() -> None:
    event = events.event_of("start", **START)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", event.pop("time"))
    assert event == {"event": "start"} | START


def test_a_cause_is_one_bounded_line() -> None:
    cause = events.event_of("failed", step=1, cause="a\nb\t" + "c" * 9000)["cause"]
    assert cause.startswith("a b ccc")
    assert len(cause) == 500


def test_a_line_that_a_crash_has_torn_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert events.read(path) == []
    events.append(path, events.event_of("start", **START))
    with path.open("a") as file:
        file.write('{"time": "2026-11-27T0')
    events.append(path, events.event_of("resume", **RESUME))
    path.write_text(path.read_text() + '[1]\n{"event": 3}\n')
    assert [event["event"] for event in events.read(path)] == ["start", "resume"]
    assert all(json.loads(line) for line in path.read_text().splitlines() if "time" not in line or line.endswith("}"))


@pytest.mark.parametrize(
    ("kinds", "ended", "restarts"),
    [
        ([], "interrupted", 0),
        (["start"], "interrupted", 0),
        (["start", "preempted"], "preempted", 0),
        (["start", "preempted", "resume"], "interrupted", 1),
        (["start", "failed", "resume", "finished"], "finished", 1),
    ],
)
def test_a_part_that_does_not_say_how_it_ended_was_interrupted(kinds: list[str], ended: str, restarts: int) -> None:
    told = [{"event": kind} for kind in kinds]
    assert events.how_it_ended(told) == ended
    assert events.restarts(told) == restarts


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("row 17 is Alice"), "ValueError"),
        (KeyError("Alice"), "KeyError"),
        (OSError(28, "No space left on device", "/home/alice/x"), "OSError (No space left on device)"),
        (InputError("data.path", "d", "does not exist."), "data.path = 'd': does not exist."),
        (LedgerError("line 1 is damaged"), "line 1 is damaged"),
    ],
)
def test_of_an_error_that_is_not_ours_everyone_reads_the_type_alone(error: Exception, cause: str) -> None:
    assert events.public_cause(error, ours=(LedgerError,)) == cause
