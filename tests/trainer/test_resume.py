"""Invariant 2: kill it anywhere, run the same command again, and nothing tells that it was interrupted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
from jobs import COMPILED_ANEW, EVERY, STEPS, Ended, Jobs, Run

from dpdist.run import metrics


@dataclass(frozen=True)
class Hammered:
    """One run on 2 processes with 2 devices each, started over and over by the same command."""

    run: Run
    #: How each of the killed parts ended, and the rank that was killed.
    killed: list[tuple[Ended, int]]
    preempted: Ended
    preempted_summary: dict[str, Any]
    checkpoints_when_preempted: list[int]
    finished: Ended


@pytest.fixture(scope="module")
def hammered(jobs: Jobs) -> Hammered:
    """Three ranks are killed, the first before any step was saved; then SIGTERM; then it is left to finish."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"killed at the random times of seed {seed}")  # shown where a test fails
    draw, run, killed = random.Random(seed), jobs.new("hammered"), []
    for first, last in ((0, 2), (4, 7), (6, 10)):
        running = jobs.launch(run, 2, 2, "data.prefetch=1", PACE="0.1")
        running.wait_for_step(run, draw.randint(first, last))
        time.sleep(draw.uniform(0, 0.2))
        rank = draw.randrange(2)
        os.kill(running.ranks()[rank], signal.SIGKILL)
        killed.append((running.wait(), rank))
    running = jobs.launch(run, 2, 2, "data.prefetch=1", PACE="0.6")  # JAX looks for the signal once a second
    running.wait_for_step(run, 9)
    os.kill(running.pid, signal.SIGTERM)
    preempted = running.wait()
    summary, checkpoints = run.summary, run.checkpoints
    return Hammered(run, killed, preempted, summary, checkpoints, jobs.launch(run, 2, 2, **COMPILED_ANEW).wait())


def test_a_killed_rank_ends_the_job_with_an_error_that_names_it(hammered: Hammered) -> None:
    for ended, rank in hammered.killed:
        assert ended.code == 128 + signal.SIGKILL
        assert f"rank {rank} of 2 was ended by SIGKILL" in ended.err


def test_sigterm_to_the_launcher_saves_and_exits_75(hammered: Hammered) -> None:
    assert hammered.preempted.code == 75, hammered.preempted.err
    summary = hammered.preempted_summary
    assert summary["status"] == "preempted"
    assert 9 < summary["step"] < STEPS
    assert summary["step"] in hammered.checkpoints_when_preempted
    assert summary["steps"] == STEPS
    assert summary["epsilon"] == hammered.run.summary["epsilon"]  # the plan's: stopping early earns nothing


def test_the_interrupted_run_ends_bit_for_bit_as_the_uninterrupted_one(hammered: Hammered, uninterrupted: Run) -> None:
    assert hammered.finished.code == 0, hammered.finished.err
    changing = {"examples_per_second", "tflops_per_device", "seconds_to_first_step", "goodput"}
    found, expected = hammered.run.summary, uninterrupted.summary
    assert {k: v for k, v in found.items() if k not in changing} == {
        k: v for k, v in expected.items() if k not in changing
    }
    assert found["status"] == "finished"


def test_every_replayed_step_samples_and_draws_the_same(hammered: Hammered, uninterrupted: Run) -> None:
    replayed = [record["step"] for record in hammered.run.diagnostics]
    assert len(replayed) > len(set(replayed))
    assert hammered.run.digests == uninterrupted.digests


def test_the_ledger_charges_each_step_once(hammered: Hammered, uninterrupted: Run) -> None:
    assert hammered.run.charged == list(range(STEPS))
    assert hammered.run.plan == uninterrupted.plan


def test_every_accuracy_shown_is_the_uninterrupted_runs(hammered: Hammered, uninterrupted: Run) -> None:
    assert set(uninterrupted.accuracies) == set(range(EVERY, STEPS + 1, EVERY))
    for step, accuracy in hammered.run.accuracies.items():
        assert accuracy == uninterrupted.accuracies[step]


def test_public_metrics_of_an_interrupted_run_read_as_one_series(hammered: Hammered, uninterrupted: Run) -> None:
    def series(run: Run) -> list[tuple[int, float]]:
        return [(r["step"], r["epsilon"]) for r in metrics.read(run.root / "metrics.jsonl") if "accuracy" not in r]

    assert series(hammered.run) == series(uninterrupted)


@pytest.fixture(scope="module")
def elsewhere(jobs: Jobs, four_processes: Run) -> dict[str, tuple[Run, Ended]]:
    """A run begun by 4 processes that crashed after step 8, gone on with by 2 processes, and by 1."""
    begun = {name: four_processes.copy(jobs.new(name).root).crash(newest=8) for name in ("4 to 2", "4 to 1")}
    ended = {
        "4 to 2": [rank.wait() for rank in jobs.ranks(begun["4 to 2"], 2, 1)],
        "4 to 1": [jobs.train(begun["4 to 1"]).wait()],
    }
    return {name: (begun[name], ended[name][0]) for name in begun}


@pytest.mark.parametrize("name", ["4 to 2", "4 to 1"])
def test_a_run_goes_on_with_fewer_processes_and_the_same_bits(
    elsewhere: dict[str, tuple[Run, Ended]], four_processes: Run, name: str
) -> None:
    run, ended = elsewhere[name]
    assert ended.code == 0, ended.err
    assert run.digests == four_processes.digests
    assert run.charged == list(range(STEPS))
    for key in ("status", "step", "epsilon", "epsilon_spent", "incarnation", "params_sha256"):
        assert run.summary[key] == four_processes.summary[key], key


def test_a_crash_between_the_last_checkpoint_and_the_summary_loses_nothing(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("end").root)
    (run.root / "summary.json").unlink()
    ended = jobs.train(run).wait()
    assert ended.code == 0, ended.err
    for key in ("status", "step", "params_sha256", "epsilon", "accuracy"):
        assert run.summary[key] == single.summary[key], key


def test_torn_last_lines_cost_no_record(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("torn").root).crash(newest=8)
    for name in ("ledger.jsonl", "metrics.jsonl", "private/diagnostics.jsonl"):
        with (run.root / name).open("a") as file:
            file.write('{"record": "steps", "st')
    ended = jobs.train(run).wait()
    assert ended.code == 0, ended.err
    assert run.summary["params_sha256"] == single.summary["params_sha256"]
    assert run.charged == list(range(STEPS))
    for name in ("metrics.jsonl", "private/diagnostics.jsonl"):
        steps = [record["step"] for record in metrics.read(run.root / name)]
        assert steps == [record["step"] for record in metrics.read(single.root / name)], name


def test_one_process_saves_on_sigterm_too(jobs: Jobs, single: Run) -> None:
    run = jobs.new("preempted")
    running = jobs.train(run, "data.prefetch=1", PACE="0.4")
    running.wait_for_step(run, 5)
    os.kill(running.pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 75, ended.err
    assert run.summary["status"] == "preempted"
    assert run.checkpoints[-1] == run.summary["step"] < STEPS
    assert jobs.train(run).wait().code == 0
    assert run.summary["params_sha256"] == single.summary["params_sha256"]


def test_a_run_that_fails_after_a_preemption_no_longer_counts_as_preempted(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("stale").root).crash(newest=8)
    (run.root / "summary.json").write_text(json.dumps(single.summary | {"status": "preempted", "step": 8}))
    (run.root / "private/diagnostics.jsonl").unlink()
    (run.root / "private/diagnostics.jsonl").mkdir()
    assert jobs.train(run).wait().code != 0
    # A batch script requeues a job whose summary says `preempted`: it would do so for ever.
    assert not (run.root / "summary.json").exists() or run.summary["status"] != "preempted"


@pytest.fixture(scope="module")
def again(jobs: Jobs, single: Run) -> tuple[Run, dict[str, Any], Ended]:
    run = single.copy(jobs.new("again").root)
    before = run.content("ledger.jsonl", "checkpoints", "summary.json", "metrics.jsonl", "private")
    return run, before, jobs.train(run).wait()


def test_a_finished_run_run_again_says_so_and_changes_nothing(again: tuple[Run, dict[str, Any], Ended]) -> None:
    run, before, ended = again
    assert ended.code == 0, ended.err
    assert re.search(r"finished at step 16 of 16: nothing to do", ended.err)
    assert run.content("ledger.jsonl", "checkpoints", "summary.json", "metrics.jsonl", "private") == before
