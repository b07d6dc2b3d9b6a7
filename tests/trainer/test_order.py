"""The order that the guarantee rests on: reserve, step, save, publish, and the lease checked before what others see."""

from __future__ import annotations

from typing import Any

import pytest
from jobs import EVERY, STEPS, Jobs, config_with

Events = list[list[Any]]


@pytest.fixture(scope="module")
def events(jobs: Jobs) -> Events:
    """Of a run on a slow disk: a save is committed only after the next step was taken."""
    return jobs.call("order_of_events", config=config_with(jobs.new("order").root))


def positions(events: Events, name: str) -> list[int]:
    return [position for position, event in enumerate(events) if event[0] == name]


def test_a_step_is_reserved_before_its_noise_is_drawn(events: Events) -> None:
    reserved: set[int] = set()
    for name, *values in events:
        if name == "reserve":
            reserved |= set(range(*values))
        if name == "draw":
            assert values[0] in reserved
    blocks = [tuple(values) for name, *values in events if name == "reserve"]
    assert blocks == [(start, start + EVERY) for start in range(0, STEPS, EVERY)]


def test_each_step_draws_its_noise_once_and_updates_once(events: Events) -> None:
    taken = [event for event in events if event[0] in ("draw", "apply")]
    assert taken == [event for step in range(STEPS) for event in (["draw", step], ["apply"])]


def test_the_lease_is_checked_right_before_each_reserve_and_each_save(events: Events) -> None:
    written = positions(events, "reserve") + positions(events, "save")
    assert len(written) == STEPS // EVERY + 1 + STEPS // EVERY
    for position in written:
        assert events[position - 1] == ["lease"], events[position]


def test_the_lease_is_checked_between_the_last_save_and_the_summary(events: Events) -> None:
    (summary,) = positions(events, "summary")
    assert events[summary] == ["summary", "finished"]
    last = positions(events, "save")[-1]
    assert events[last] == ["save", STEPS]
    assert ["lease"] in events[last:summary]


def test_what_was_measured_is_noted_and_then_shown_only_once_its_checkpoint_is_committed(events: Events) -> None:
    published = [event for event in events if event[0] in ("saved", "shown")]
    assert all(committed for _, _, committed in published)
    steps = [step for name, step, _ in published if name == "shown"]
    assert published == [event for step in steps for event in (["saved", step, True], ["shown", step, True])]
    assert steps == sorted(steps)
    assert set(steps) == set(range(EVERY, STEPS + 1, EVERY))
