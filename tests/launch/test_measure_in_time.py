"""`dpdist bench clipping` where time is short, in every format of the products, and with some peers missing."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

import gzip
import json
from pathlib import Path
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


def test_where_time_is_short_what_does_not_compile_is_measured_before_further_methods() -> None:
    clock = Clock()
    measured = [fake("sgd", 4.0, clock), fake("tensor", 6.0, clock), fake("per_example", 5.0, clock)]
    measured += [fake("torch sgd", 1.0, clock, framework="torch"), fake("opacus", 2.0, clock, framework="torch")]
    found = measure(MLP, 6, measured, naive=False, rounds=1, seconds=0.0, time_limit=29.0, clock=clock)["arms"]
    # Two calls each: at 8, 20, 22 and 26 s. The third of JAX is not begun: it might take 12 s more.
    assert [name for name in found if "seconds" in found[name]] == ["sgd", "tensor", "torch sgd", "opacus"]
    assert found["per_example"]["failed"] == clipping.NO_TIME
    # The first of another framework may take as long as the quickest so far.
    clock = Clock()
    measured = [fake("sgd", 4.0, clock), fake("tensor", 6.0, clock), fake("torch sgd", 1.0, clock, framework="torch")]
    found = measure(MLP, 6, measured, naive=False, rounds=1, seconds=0.0, time_limit=28.0, clock=clock)["arms"]
    assert found["torch sgd"]["failed"] == clipping.NO_TIME


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


def test_arms_are_measured_in_the_order_they_are_asked_for_after_plain_sgd() -> None:
    request = Request(models=["mnist-cnn"], methods=["tensor", "naive", "auto", "sgd", "ghost"])
    assert [arm.name for arm in clipping.arms_of(request)] == ["sgd", "tensor", "auto", "ghost"]


def test_kernels_are_kept_with_the_program_they_are_of_and_a_profiler_that_fails_costs_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "tiny", MLP)
    request = Request(models=["tiny"], methods=["per_example"], rounds=1, seconds=0, profile=True, to=tmp_path)
    arms_found = clipping.bench_clipping(request)["models"]["tiny"]["arms"]
    for name in ("sgd", "per_example"):
        found = arms_found[name]["profile"]
        assert found["microseconds"] > 0
        assert found["kernels"][0]["launches"] >= 1
        assert b"HloModule" in gzip.decompress((tmp_path / "programs" / f"tiny-{name}.hlo.gz").read_bytes())
    assert json.loads((tmp_path / "clipping.json").read_text())["models"]["tiny"]["arms"] == arms_found

    def fails(run: Any) -> Any:
        raise RuntimeError("no trace here")

    monkeypatch.setattr(clipping, "profiled", fails)
    again = clipping.bench_clipping(request)["models"]["tiny"]["arms"]["per_example"]
    assert again["profile"] == {"failed": "RuntimeError: no trace here"}
    assert again["seconds"] > 0
