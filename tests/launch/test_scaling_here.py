"""Real sweeps of local processes: interrupted and taken up again, beside misleading files, and failing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_scaling_sweep import TREE, files, request

import dpdist
from dpdist_launch.cli import main
from dpdist_launch.measure.scaling.arms import DP, SGD, SGD_SYNC
from dpdist_launch.measure.scaling.sweep import sweep

SOURCE = Path(dpdist.__file__).parents[1]
SMALL = ("--cluster", "local", "--steps", "3", "--nodes", "1,2")


def start(config: Path, to: Path, *options: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    ours = ("JAX_", "XLA_", "DPDIST_", "SLURM_", "NPROC", "OMP_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dpdist_launch", "scaling", str(config), "--to", str(to), *SMALL, *options],
        cwd=cwd,
        env=environ | {"PYTHONPATH": str(SOURCE)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_sweep_interrupted_and_taken_up_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, to = tmp_path / "tiny.yaml", tmp_path / "sweep"
    config.write_text(yaml.safe_dump(TREE))
    first = start(config, to)
    deadline = time.monotonic() + 120
    while not files(to):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    time.sleep(1.0)  # well into the second point
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 75, said
    assert "the same command goes on from here" in said
    before = files(to)
    assert 1 <= len(before) < 6

    second = start(config, to)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert f"{len(before)} of 6 points are measured already" in said
    assert "[6/6] " in said
    after = files(to)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    points = [json.loads(content) for _, content in after.values()]
    for point in points:
        assert point["processes"] == point["devices"] == point["nodes"]
        assert point["physical_batch_size"] == 16
        assert point["all_reduces_per_step"] == (
            point["microbatches_per_step"] if point["arm"] == SGD_SYNC else 2 if point["arm"] == DP else 1
        )
    assert len({point["epsilon"] for point in points if point["arm"] == DP}) == 1
    assert json.loads((to / "scaling.json").read_text())["missing"] == {}
    assert "dp / sgd" in (to / "scaling.md").read_text()
    assert "overhead, not speed" in (to / "scaling.md").read_text()
    assert (to / "jobs").stat().st_mode & 0o077 == 0

    assert main(["scaling", str(config), "--to", str(to), *SMALL, "optimizer.learning_rate=3"]) == 2
    assert "optimizer.learning_rate = 3" in capsys.readouterr().err
    assert files(to) == after


def test_a_real_point_beside_files_with_the_names_of_modules(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TREE))
    for name in ("dpdist_launch.py", "json.py", "jax.py"):
        (tmp_path / name).write_text("import os\nos._exit(0)\n")
    run = start(config, tmp_path / "sweep", "--arms", "sgd", "--nodes", "1", cwd=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert len(files(tmp_path / "sweep")) == 1


def test_a_local_point_whose_processes_return_0_without_a_result_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dpdist_launch.measure.scaling.clusters.run_part", lambda *_, **__: 0)
    began = time.monotonic()
    assert sweep(request(tmp_path, cluster="local", nodes=(1,), arms=(SGD,))) == 1
    assert "failed (job here: FAILED (although every process returned 0))" in capsys.readouterr().err
    assert time.monotonic() - began < 30  # no network file system to wait for


def test_a_real_point_that_fails_is_shown_with_its_reason(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TREE | {"data": {"source": "npy", "path": str(tmp_path / "none")}}))
    run = start(config, tmp_path / "sweep", "--arms", "sgd", "--nodes", "1")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "[1/1] sgd n=1 r=1: failed" in said
    assert "dpdist: error: data.path = " in said
    assert "Traceback" not in said
