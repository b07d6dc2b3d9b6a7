"""`dpdist bench clipping` where time is short, in every format of the products, and with some peers missing."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

from typing import Any

import jax
import pytest

from dpdist_launch.measure.bench import arms, clipping, peers
from dpdist_launch.measure.bench.clipping import Request, measure
from dpdist_launch.measure.bench.program import Arm, Program
from dpdist_launch.measure.bench.rounds import interleaved
from dpdist_launch.measure.bench.tasks import TASKS, Problem
from tests.support.fake_arms import Clock, fake, forever
from tests.support.small_tasks import MLP, VIT


def test_rounds_end_in_time_but_not_before_the_first() -> None:
    clock = Clock()
    assert (
        interleaved({"a": clock.run(forever(1.0))}, rounds=9, seconds=0.0, clock=clock, until=5.0)["a"].wall
        == [1.0] * 3
    )
    assert interleaved({"a": clock.run(forever(1.0))}, rounds=9, seconds=0.0, clock=clock, until=0.0)["a"].wall == [1.0]


def test_where_time_is_short_the_first_arms_are_measured_and_kept_as_they_come() -> None:
    clock = Clock()
    measured = [fake("sgd", 2.0, clock), fake("auto", 3.0, clock), fake("ghost", 5.0, clock), fake("late", 1.0, clock)]
    seen: list[list[str]] = []

    def after_arm(found: dict[str, Any]) -> None:
        seen.append([name for name, arm in found["arms"].items() if "second_call_seconds" in arm])

    found = measure(
        MLP, 6, measured, naive=False, rounds=3, seconds=0.0, time_limit=19.0, clock=clock, after_arm=after_arm
    )
    # Two calls each: at 4 s, 10 s and 20 s the first three are ready, and the fourth is not begun.
    assert seen == [["sgd"], ["sgd", "auto"], ["sgd", "auto", "ghost"]]
    assert found["arms"]["late"]["failed"] == clipping.NO_TIME
    assert [len(found["arms"][name]["seconds_by_round"]) for name in ("sgd", "auto", "ghost")] == [1, 1, 1]


def test_products_in_bfloat16_or_full_float32_are_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "tiny", VIT)
    programs = {}
    for form in clipping.FORMATS:
        seen: list[str] = []

        def arms_of(request: Request, seen: list[str] = seen) -> list[Arm]:
            def prepare(problem: Problem) -> Program:
                seen.append(
                    str(jax.make_jaxpr(problem.loss)(problem.params, {k: v[0] for k, v in problem.batch.items()}))
                )
                return arms.jax_arm("sgd").prepare(problem)

            return [Arm(name="sgd", framework="jax", private=False, prepare=prepare)]

        monkeypatch.setattr(clipping, "arms_of", arms_of)
        request = Request(models=["tiny"], methods=["sgd"], format=form, rounds=1, seconds=0)
        assert clipping.bench_clipping(request)["settings"]["format"] == form
        programs[form] = seen[0]
    assert "bf16" in programs["bf16"]
    assert "bf16" not in programs["tf32"] + programs["float32"]
    assert "HIGHEST" in programs["float32"]
    assert "HIGHEST" not in programs["tf32"]


def test_peers_that_are_installed_are_measured_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.peer_arms(installed=True) == []
