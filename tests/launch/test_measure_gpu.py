"""What the steps of `launch/gpu.sh` measure on a device, tried on the processor."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist_launch.measure.bench import profile
from dpdist_launch.measure.gpu import gamma, page, zoo


def test_a_device_that_loses_more_than_is_assumed_fails_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"bfloat16": 0.1, "tf32": 2.5}
    monkeypatch.setattr(gamma, "largest_loss", losses.__getitem__)
    monkeypatch.setattr("sys.argv", ["gamma", "--to", str(tmp_path / "g.json")])
    assert gamma.main() == 1
    assert capsys.readouterr().err == "tf32 loses 2.5 times what the bound assumes\n"
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["formats"] == losses
    assert list(page.gamma(content))[-1].endswith("| tf32 | 2.500 | **BEYOND** |")
    losses["tf32"] = 1.0
    assert gamma.main() == 0


def run_zoo(tmp_path: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        two = list(zoo.products("float32"))[:2]
        patch.setattr(zoo, "cases", lambda: iter([("tf32", lambda: iter(two))]))
        return zoo.zoo(tmp_path / "zoo.json", tiny=False, limit=600)


def test_the_zoo_passes_here_and_is_written_as_it_goes(tmp_path: Path) -> None:
    content = run_zoo(tmp_path)
    assert content["complete"]
    assert [row["ok"] for row in content["checks"]] == [True] * 4  # two strategies, each in two precisions
    assert all(0.99 < row["smallest_clipped"] <= row["largest"] <= 1.0 for row in content["checks"])
    assert json.loads((tmp_path / "zoo.json").read_text()) == content


@pytest.mark.parametrize(("scale", "ok"), [(1 + 1e-5, False), (0.5, False), (1 - 1e-3, True)])
def test_the_zoo_sees_a_contribution_over_c_or_far_below_it(
    scale: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(loss: Any, **how: Any) -> Any:
        summed = clipped_grad_sum(loss, **how)
        return lambda *args: (jax.tree.map(lambda leaf: leaf * np.float32(scale), summed(*args)[0]), None)

    monkeypatch.setattr(zoo, "clipped_grad_sum", scaled)
    assert run_zoo(tmp_path)["checks"][2]["ok"] is ok  # of `instantiate`, which is exact to 2e-6


def test_a_case_that_fails_does_not_end_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = zoo.check

    def check(case: zoo.Case, *rest: Any) -> Any:
        if case.name.endswith("ghost"):
            raise MemoryError("out of it")
        return real(case, *rest)

    monkeypatch.setattr(zoo, "check", check)
    first, second, *others = run_zoo(tmp_path)["checks"]
    assert first["failed"] == second["failed"] == "MemoryError: out of it"
    assert not first["ok"]
    assert all(row["ok"] for row in others)


def test_a_precision_that_clipping_knows_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def knows(loss: Any, *, precision: str, **how: Any) -> Any:
        asked.append(precision)
        return clipped_grad_sum(loss, **how)

    monkeypatch.setattr(zoo, "clipped_grad_sum", knows)
    assert run_zoo(tmp_path)["precisions"] == ["highest", "tensor"]
    assert asked == ["highest", "tensor"] * 2


def test_every_case_of_the_zoo_can_be_made() -> None:
    made = [case.name for _, make in zoo.cases() for case in make()]
    assert {"mlp", "cnn", "vit", "bert", "bit_resnet"} < set(made)
    assert made.count("swamped, ghost") == 2


def test_kernels_are_counted_once_and_on_the_device_where_there_is_one() -> None:
    def names(pid: int, process: str, **threads: str) -> list[dict[str, Any]]:
        named = partial(dict, ph="M", pid=pid)
        return [
            named(name="process_name", args={"name": process}),
            *(named(name="thread_name", tid=int(tid[1:]), args={"name": name}) for tid, name in threads.items()),
        ]

    def event(pid: int, tid: int, name: str, dur: float) -> dict[str, Any]:
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": dur}

    host = [
        {},
        *names(1, "/host:CPU", t5="tf_XLAEigen/1"),
        event(1, 5, "dot.1", 7.0),
        event(1, 5, "Thunk::Execute", 9.0),
    ]
    gpu = names(2, "/device:GPU:0", t1="Stream #13(Compute)", t2="XLA Ops", t3="XLA Modules")
    gpu += [
        event(2, 1, "cutlass::gemm", 3.0),
        event(2, 1, "cutlass::gemm", 4.0),
        event(2, 2, "dot.1", 7.0),
        event(2, 3, "jit_f", 7.0),
    ]
    assert profile.kernels({"traceEvents": host})[0] == {"dot.1": 7.0}
    spent, number = profile.kernels({"traceEvents": host + gpu})
    assert (spent, number) == ({"cutlass::gemm": 7.0}, {"cutlass::gemm": 2})
