"""What a run says of time does not tell how long a single step took, and so how large its sample was."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from private_runs import config_of

from dpdist.run import recorder
from dpdist.run.directory import RunDirectory
from dpdist.run.recorder import Recorder

STEPS = 45


def told(tmp_path: Path, times: list[float], monkeypatch: pytest.MonkeyPatch, capsys: Any, log_every: int) -> list[str]:
    """All that a run says whose steps take so many seconds each: metrics, log, and the rate of the summary."""
    clock = [0.0]
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = RunDirectory(tmp_path)
    run.prepare()
    plan: Any = SimpleNamespace(
        privacy=None, steps=STEPS, start=0, incarnation=0, expected_batch_size=64.0, steps_asked=STEPS
    )
    start: Any = SimpleNamespace(plan=plan, step=None, fresh=True)
    config = config_of(run={"log_every": log_every, "progress": "lines"}, training={"steps": STEPS})
    recording = Recorder(config, start, run, None, seconds_to_first_step=1.0)
    assignment: Any = SimpleNamespace(rounds=1, sample=np.zeros(1))
    for step, seconds in enumerate(times):
        clock[0] += seconds
        recording.step_done(step, assignment, np.array([4.0, 0, 0, 1.0]), None)  # type: ignore[arg-type]
    recording.flush()
    recording.close()
    return [run.metrics.read_text(), capsys.readouterr().err, repr(recording.examples_per_second())]


@pytest.mark.parametrize("log_every", [1, 3, 10])
def test_steps_that_take_turns_in_being_slow_change_nothing_that_is_told(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(log_every)
    # Whole numbers, so that their sums are exact in any order. A step is recorded when the next one is dispatched.
    times = [float(draw.randint(4, 9)) for _ in range(STEPS)]
    stretch = 10 if log_every < 10 else log_every
    ends = [log_every * -(-stretch // log_every) * n for n in range(1, STEPS)]
    shuffled, begun = [times[0]], 1
    for end in [*(end for end in ends if end < STEPS), STEPS - 1]:
        part = times[begun : end + 1]
        draw.shuffle(part)
        shuffled, begun = shuffled + part, end + 1
    shuffled[-3:] = [50.0, 0.5, 7.0]  # after the last time that is shown
    assert shuffled != times
    first, second = (
        told(tmp_path / name, each, monkeypatch, capsys, log_every)
        for name, each in (("first", times), ("second", shuffled))
    )
    assert first == second
    assert '"seconds": null' not in first[0].splitlines()[-1]
    assert "ETA 0:00" in first[1]
