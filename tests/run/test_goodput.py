"""What a run's node-hours went into: one clock, over crashes and resumes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dpdist.run import goodput
from dpdist.run.goodput import Goodput, process_began, public_of, sentence


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "goodput.json"


def spent(path: Path) -> dict[str, float]:
    record = goodput.read(path)
    assert record is not None
    return {name: seconds for name, seconds in record["node_seconds"].items() if seconds}


def first_part(path: Path, clock: Clock) -> Goodput:
    """10 s of starting up, 4 of compiling, 20 of training that are saved and 6 that are not; on two nodes."""
    part = Goodput(path, nodes=2, began=clock.now - 8)
    with part.phase("compile"):
        clock.now += 4
    clock.now += 2
    part.resumed(0)
    part.enter("training")
    clock.now += 20
    part.saving(5)
    with part.phase("saving"):
        clock.now += 1
    with part.phase("evaluation"):
        clock.now += 3
    clock.now += 6
    return part


def test_every_second_is_in_one_phase_times_the_nodes(path: Path, clock: Clock) -> None:
    began = clock.now - 8
    first_part(path, clock).write(closed=True)
    assert spent(path) == {"start_up": 20, "compile": 8, "training": 52, "saving": 2, "evaluation": 6}
    assert sum(spent(path).values()) == 2 * (clock.now - began)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_was_trained_after_the_save_is_lost_where_the_run_goes_on_from_it(path: Path, clock: Clock) -> None:
    first_part(path, clock).write(closed=True)
    part = Goodput(path, nodes=1, began=clock.now)
    part.resumed(5)
    part.enter("training")
    clock.now += 7
    part.saving(9)
    part.write(closed=True)
    assert spent(path) == {"start_up": 20, "compile": 8, "training": 40 + 7, "saving": 2, "evaluation": 6, "lost": 12}


def test_going_back_behind_all_saves_loses_all_training(path: Path, clock: Clock) -> None:
    first_part(path, clock).write(closed=True)
    part = Goodput(path, nodes=1, began=clock.now)
    part.resumed(3)
    assert spent(path)["lost"] == 52
    assert "training" not in spent(path)


def test_a_crash_loses_the_time_since_the_last_write_and_that_is_counted(path: Path, clock: Clock) -> None:
    first_part(path, clock).write()
    clock.now += 100  # and then it was killed, unwritten
    last_sign = path.stat().st_mtime + 9
    part = Goodput(path, nodes=1, began=clock.now, last_sign=last_sign)
    part.resumed(5)
    assert spent(path)["lost"] == pytest.approx(12 + 2 * 9)
    assert sum(spent(path).values()) == pytest.approx(88 + 18)


def test_a_crash_before_the_first_step_is_counted_too(path: Path, clock: Clock) -> None:
    first_part(path, clock).write(closed=True)
    Goodput(path, nodes=2, began=clock.now - 3)  # killed while it compiles
    part = Goodput(path, nodes=2, began=clock.now, last_sign=path.stat().st_mtime + 40)
    part.resumed(5)
    assert spent(path)["start_up"] == 20 + 2 * 3
    assert spent(path)["lost"] == pytest.approx(12 + 2 * 40)


def test_an_end_in_good_order_loses_nothing(path: Path, clock: Clock) -> None:
    first_part(path, clock).write(closed=True)
    Goodput(path, nodes=1, began=clock.now, last_sign=path.stat().st_mtime + 9).resumed(5)
    assert spent(path)["lost"] == 12  # the steps after the save alone


def test_it_is_written_every_ten_seconds_while_steps_are_taken(path: Path, clock: Clock) -> None:
    part = Goodput(path, nodes=1, began=clock.now)
    assert spent(path) == {}
    part.enter("training")
    for _ in range(int(goodput.EVERY) - 1):
        clock.now += 1
        part.tick(0.0)
    assert spent(path) == {}
    clock.now += 1
    part.tick(0.25)
    assert spent(path) == {"training": 10}
    record = goodput.read(path)
    assert record is not None
    assert record["waiting"] == 2.5


def test_the_queue_holds_no_node(path: Path, clock: Clock) -> None:
    part = Goodput(path, nodes=4, began=clock.now)
    assert part.public()["queue_hours"] is None
    part.queued(1800)
    clock.now += 900
    part.write(closed=True)
    part = Goodput(path, nodes=4, began=clock.now)
    part.queued(1800)
    assert part.public() == {
        "shares": {"start_up": 1, "compile": 0, "training": 0, "evaluation": 0, "saving": 0, "lost": 0},
        "node_hours": 1.0,
        "queue_hours": 1.0,
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"node_seconds": {"training": 3}}',
        json.dumps({"node_seconds": dict.fromkeys(goodput.PHASES, "x"), "waiting": 0, "nodes": 1}),
    ],
)
def test_a_file_that_is_not_whole_is_counted_anew_with_a_warning(
    path: Path, clock: Clock, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(content)
    Goodput(path, nodes=1, began=clock.now - 3, last_sign=1e12).write()
    assert spent(path) == {"start_up": 3}
    assert "counted anew" in caplog.text


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    Goodput(tmp_path / "gone/goodput.json", nodes=1, began=clock.now).write()
    assert "could not be written" in caplog.text


def test_what_is_public_are_whole_percents_and_no_waiting_for_single_ranks() -> None:
    seconds = {"start_up": 100.1, "compile": 50.0, "training": 1234.5678, "evaluation": 3.0, "saving": 2.0, "lost": 0.0}
    public = public_of({"node_seconds": seconds, "queue_seconds": 77.123, "waiting": 600.0})
    assert public == {
        "shares": {"start_up": 0.07, "compile": 0.04, "training": 0.89, "evaluation": 0, "saving": 0, "lost": 0},
        "node_hours": 0.39,
        "queue_hours": 0.021,
    }
    assert sentence(public) == "0.39 node-hours: training 89%, start-up 7%, compile 4%; 0.021 h in the queue"


def test_a_process_knows_when_it_was_started() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / ticks
    age = float(Path("/proc/uptime").read_text().split()[0]) - started
    assert time.monotonic() - process_began() == pytest.approx(age, abs=1)
