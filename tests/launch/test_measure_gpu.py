"""What the steps of `launch/gpu.sh` measure on a device, tried on the processor."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist_launch.measure.bench import gamma
from dpdist_launch.measure.gpu import profile, zoo


@pytest.mark.parametrize("bits", [7, 10])
def test_operands_fit_their_format(bits: int) -> None:
    rng = np.random.default_rng(0)
    for pattern in gamma.PATTERNS:
        for side in gamma.operands(pattern, 8, 64, bits, rng):
            assert np.array_equal(side, np.asarray(jax.lax.reduce_precision(side, 8, bits)))
            if bits == 7:
                assert np.array_equal(side, side.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_error_is_told_in_units_of_the_bound() -> None:
    a, b = np.full((1, 48), 2.0, np.float32), np.full((48, 1), 0.5, np.float32)
    wrong = np.array([[48.0 * (1 - 3 * (48 + 16) * 2.0**-24)]])
    assert gamma.error_of(wrong, a, b) == pytest.approx(3.0)
    assert gamma.error_of(np.array([[48.0]]), a, b) == 0.0


def test_a_device_that_accumulates_in_bfloat16_is_beyond_what_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gamma.main(["--tiny", "--to", str(tmp_path / "g.json")]) == 0
    assert json.loads((tmp_path / "g.json").read_text())["formats"].keys() == gamma.FORMATS.keys()
    matmul = gamma.jnp.matmul
    short = lambda a, b, **how: matmul(a, b, **how).astype("bfloat16").astype("float32")  # noqa: E731
    monkeypatch.setattr(gamma.jnp, "matmul", short)
    assert gamma.main(["--tiny"]) == 1
    assert "exceeds 4" in capsys.readouterr().err


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
