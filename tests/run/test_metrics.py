"""What is shown waits for its checkpoint, and what an incarnation went back behind is no longer part of the series."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpdist.run.metrics import Publisher, Stream, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_only_what_was_measured_up_to_the_saved_step_is_shown(path: Path) -> None:
    public = Publisher(Stream(path))
    for step in (10, 20, 30):
        public.hold({"step": step, "accuracy": step / 100})
    public.write({"step": 25, "epsilon": 1.0})
    assert [record["step"] for record in public.release(20)] == [10, 20]
    assert [record["step"] for record in read(path) if "accuracy" in record] == [10, 20]
    assert public.release(20) == []
    assert [record["step"] for record in public.release(30)] == [30]
    public.hold({"step": 40, "accuracy": 0.4})
    public.close()
    assert max(record["step"] for record in read(path)) == 30


def test_a_new_incarnation_takes_back_what_followed_its_first_step(path: Path) -> None:
    public = Publisher(Stream(path))
    for step in (10, 20, 30):
        public.write({"step": step, "epsilon": step})
    public.write({"step": 10, "incarnation": 1})
    public.write({"step": 20, "epsilon": 50})
    assert read(path) == [{"step": 10, "epsilon": 10}, {"step": 20, "epsilon": 50}]


def test_the_last_record_of_a_step_counts_and_torn_lines_do_not(path: Path) -> None:
    stream = Stream(path)
    for epsilon in (1, 2):
        stream.write({"step": 10, "epsilon": epsilon})
    stream.close()
    with path.open("a") as file:
        file.write('{"step": 20, "eps')
    assert read(path) == [{"step": 10, "epsilon": 2}]
    Stream(path).write({"step": 30, "epsilon": 3})
    assert read(path) == [{"step": 10, "epsilon": 2}, {"step": 30, "epsilon": 3}]
    assert read(path.with_name("none")) == []
