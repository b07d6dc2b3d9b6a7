"""A sweep as a SLURM job that submits its points as jobs, is told to leave, and is taken up again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
TREE = {
    "model": {"name": "mlp", "options": {"hidden": [8], "scale": 16}},
    "privacy": {"noise_multiplier": 4.0, "delta": 1e-4},
    "sampling": {"expected_batch_size": 64},
    "training": {"steps": 10, "physical_batch_size": 16},
    "cluster": {"platform": "cpu"},
}
LIMIT = 300.0


def wait_for_line(log: Path, words: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not log.exists() or words not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


def test_a_sweep_submits_each_point_once_although_it_is_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    config, to, log = tmp_path / "tiny.yaml", tmp_path / "sweep", tmp_path / "sweep.log"
    config.write_text(yaml.safe_dump(TREE))
    command = tmp_path / "dpdist"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch "$@"\n')
    command.chmod(0o755)
    environ = {**slurm, "PYTHONPATH": str(REPOSITORY), "DPDIST": str(command), "NPROC": "1"}
    asked = [str(config), "--nodes", "1,2", "--arms", "dp,sgd", "--gpus-per-node", "2", "--steps", "3"]
    asked += ["--cpus-per-task", "1", "--jobs", "2", "--to", str(to), "--time", "00:20:00"]
    options = ["--parsable", "--cpus-per-task=1", f"--output={log}", f"--chdir={REPOSITORY}"]

    def ask(*words: str) -> str:
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout

    orchestrator = ask("sbatch", *options, "slurm/scaling.sh", *asked).strip()
    try:
        wait_for_line(log, "sgd n=1 r=1: submitted")
        ask("scancel", "--signal=TERM", orchestrator)
        wait_for_line(log, "dpdist job: preempted; requeued")
        # SLURM holds the requeued job for two minutes; the same command elsewhere finds the jobs as well.
        command_line = [sys.executable, "-m", "launch", "scaling", *asked]
        again = subprocess.run(command_line, env=environ, capture_output=True, text=True, timeout=LIMIT, check=False)
    finally:
        ask("scancel", orchestrator)
    assert again.returncode == 0, again.stderr
    assert "of an earlier call is" in again.stderr or "are measured already" in again.stderr
    submitted = re.findall(r"(\S+ n=\d r=1): submitted as job (\d+)", log.read_text() + again.stderr)
    assert sorted(point for point, _ in submitted) == ["dp n=1 r=1", "dp n=2 r=1", "sgd n=1 r=1", "sgd n=2 r=1"]
    points = [json.loads(path.read_text()) for path in (to / "points").iterdir()]
    assert {(p["arm"], p["nodes"], p["processes"], p["devices"]) for p in points} == {
        (arm, nodes, 2 * nodes, 2 * nodes) for arm in ("dp", "sgd") for nodes in (1, 2)
    }
    assert "overhead, not speed" in (to / "scaling.md").read_text()


def test_a_point_that_slurm_refuses_is_an_input_error(slurm: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TREE))
    words = [sys.executable, "-m", "launch", "scaling", str(config), "--nodes", "1", "--to", str(tmp_path / "sweep")]
    words += ["--partition", "nowhere"]
    refused = subprocess.run(
        words, env={**slurm, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert refused.returncode == 2
    assert "SLURM refused" in refused.stderr


def test_a_node_count_that_the_cluster_has_not_is_given_up(slurm: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TREE))
    words = [sys.executable, "-m", "launch", "scaling", str(config), "--nodes", "21", "--arms", "sgd"]
    words += ["--to", str(tmp_path / "sweep")]
    done = subprocess.run(
        words, env={**slurm, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1
    found = re.search(r"cannot be had: job (\d+) was PENDING \(Partition\w+\), and is cancelled", done.stderr)
    assert found is not None, done.stderr
    queue = subprocess.run(["squeue", "--noheader"], env=slurm, capture_output=True, text=True, check=True)
    assert found[1] not in queue.stdout
