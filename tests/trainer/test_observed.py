"""What a run tells of itself: events, what its time went into, a trace; and that nothing of it changes a result."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import pytest
from jobs import EVERY, STEPS, Jobs, Run, lines, wait_all

from dpdist.run import events


def told(run: Run) -> list[dict[str, Any]]:
    """The events of a run, without their times."""
    found = lines(run.root / "events.jsonl")
    assert all(event.pop("time").endswith("Z") for event in found)
    return found


def hook(run: Run) -> str:
    """`run.on_event` that notes what it is told beside the run, and then fails."""
    code = f"import sys; open({str(run.root) + '.told'!r}, 'a').write(sys.stdin.read() + chr(10)); raise SystemExit(3)"
    return f"run.on_event={json.dumps([sys.executable, '-c', code])}"


def called(run: Run) -> list[dict[str, Any]]:
    return lines(run.root.with_name(run.root.name + ".told"))


@pytest.fixture(scope="module")
def resumed(jobs: Jobs) -> Run:
    """Killed after its second save, and resumed with a trace of some steps."""
    run = jobs.new("observed")
    running = jobs.train(run, hook(run), "data.prefetch=1", PACE="0.2")
    running.wait_for_step(run, 2 * EVERY + 1)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    again = jobs.train(run, hook(run), f"training.profile=[3, {2 * EVERY + 2}]").wait()
    assert again.code == 0, again.err
    return run


def test_a_run_tells_when_it_began_was_interrupted_and_ended(resumed: Run) -> None:
    here = {"steps": STEPS, "nodes": 1, "processes": 1}
    began, again, ended = told(resumed)
    assert began == {"event": "start", "step": 0} | here
    assert again.pop("step") in (EVERY, 2 * EVERY)  # the second save may not have been committed
    assert again == {"event": "resume", "restarts": 1, "after": "interrupted"} | here
    assert ended == {"event": "finished", "step": STEPS, "status": "finished"}


def test_a_command_that_fails_is_told_of_the_end_alone_and_changes_nothing(resumed: Run, single: Run) -> None:
    (event,) = called(resumed)
    assert (event["event"], event["run"]) == ("finished", resumed.root.name)
    assert "returned 3" in (resumed.root / "private/logs/rank-0.log").read_text()
    assert resumed.summary["params_sha256"] == single.summary["params_sha256"]


def test_a_trace_of_some_steps_changes_no_bit_and_is_private(resumed: Run, single: Run) -> None:
    traces = [path for path in resumed.root.rglob("*.xplane.pb")]
    assert len(traces) == 1
    assert (resumed.root / "private/profile") in traces[0].parents
    assert resumed.summary["params_sha256"] == single.summary["params_sha256"]
    assert not list(single.root.rglob("*.xplane.pb"))


def test_what_the_time_went_into_is_counted_over_the_crash(resumed: Run, single: Run) -> None:
    shares = resumed.summary["goodput"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.04)
    assert shares["start_up"] > 0
    assert shares["training"] > 0
    record = json.loads((resumed.root / "private/goodput.json").read_text())
    assert record["closed"]
    assert record["node_seconds"]["lost"] > 0.1  # at least one step of 0.2 s had to be taken again
    undisturbed = json.loads((single.root / "private/goodput.json").read_text())
    assert undisturbed["node_seconds"]["lost"] == 0
    assert undisturbed["saves"][-1][0] == STEPS


def test_times_of_phases_are_under_private_alone(resumed: Run) -> None:
    """Public are whole percents of them: what single steps took would tell how many examples were in them."""
    public = resumed.summary["goodput"]
    assert public.keys() == {"shares", "node_hours", "queue_hours"}
    assert all(share == round(share, 2) for share in public["shares"].values())
    for path in resumed.root.rglob("*"):
        if path.is_file() and "private" not in path.relative_to(resumed.root).parts:
            assert b"node_seconds" not in path.read_bytes(), path
            assert b"waiting" not in path.read_bytes(), path


def test_the_speed_is_that_of_the_examples_the_plan_expects(single: Run) -> None:
    summary = single.summary
    assert summary["mfu"] is None  # of a CPU no peak is known
    assert summary["tflops_per_device"] > 0
    assert summary["seconds_to_first_step"] > 0


def test_a_failure_before_the_first_step_is_told_with_its_cause(jobs: Jobs) -> None:
    run = jobs.new("failed-early")
    ended = jobs.train(run, hook(run), "cluster.memory_per_device=1e-9").wait()
    assert ended.code == 2, ended.err
    (event,) = told(run)
    assert event["event"] == "failed"
    assert event["cause"].startswith("training.physical_batch_size = 8: needs ")
    assert [call["event"] for call in called(run)] == ["failed"]


def test_an_error_while_training_is_told_by_its_type(jobs: Jobs) -> None:
    run = jobs.new("failed-late")
    ended = jobs.train(run, hook(run), "data.source=userland:failing", "data.options.index=500").wait()
    assert ended.code == 1
    began, failed = told(run)
    assert (began["event"], failed["event"]) == ("start", "failed")
    assert failed["cause"] in ended.err
    assert "Alice" not in json.dumps([failed, called(run)])


def test_the_third_restart_is_an_occasion(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("restarted").root).crash(2 * EVERY)
    fields = {"steps": STEPS, "nodes": 1, "processes": 1, "step": EVERY, "after": "failed"}
    path = run.root / "events.jsonl"
    path.unlink()
    for number in (1, 2):
        events.append(path, events.event_of("resume", **fields, restarts=number))
    wait_all([jobs.train(run, hook(run))])
    assert [(call["event"], call.get("restarts")) for call in called(run)] == [("resume", 3), ("finished", None)]
    assert run.summary["params_sha256"] == single.summary["params_sha256"]
