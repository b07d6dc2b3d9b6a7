"""A sweep as a real array of jobs: each point a run of its own, one of them preempted alone, all to their ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from batch import start_requeued
from jobs import Jobs, Run, wait_for

from dpdist_launch.slurm.job import attach

STEPS = 6


def submit_sweep(jobs: Jobs, root: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What `dpdist submit --sweep` prints: its JSON, and the table."""
    words = [sys.executable, "-m", "launch", "submit", str(jobs.config), "--nodes", "1"]
    words += ["--cpus-per-task", "1", "--run-dir", str(root), "--sweep", "optimizer.learning_rate=0.1,0.3,1"]
    words += [f"training.steps={STEPS}", "data.prefetch=1", "privacy.insecure_seed=null", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_one_job_of_an_array_is_requeued_alone_and_the_same_line_follows_all_to_the_end(cluster: Jobs) -> None:
    root, pace = cluster.new("sweep").root, cluster.root / "sweep.pace"
    pace.write_text("0.3")
    os.environ |= {"PACE": str(pace), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    found, _ = submit_sweep(cluster, root, "--at-most", "3")
    runs = [Run(Path(point["run_dir"])) for point in found["points"]]
    # The last job of an array has the number of the array itself.
    last = attach(runs[2].root)
    assert last is not None
    assert last.id == f"{found['job']}_2"
    wait_for(lambda: any(record["step"] >= 1 for record in runs[2].diagnostics), every=0.1)
    subprocess.run(["scancel", "--signal=TERM", last.id], check=True)
    wait_for(lambda: (runs[2].root / "summary.json").exists() and last.state() == "PENDING", every=0.1)
    assert runs[2].summary["status"] == "preempted"
    shown = subprocess.run(["scontrol", "show", "job", last.id], capture_output=True, text=True, check=True)
    assert f"JobId={found['job']} ArrayJobId={found['job']} ArrayTaskId=2 " in shown.stdout, "another one was given it"
    pace.unlink()
    start_requeued(found["job"], os.environ, called=last.id)
    again, table = submit_sweep(cluster, root, "--follow")
    twice = [Path(point["log"]).read_text()[-2000:] for point in found["points"]]
    assert again["job"] is None, f"a point that had a job was submitted twice; the first logs: {twice}"
    assert [point["state"] for point in again["points"]] == ["finished"] * 3
    assert [point["step"] for point in again["points"]] == [STEPS] * 3
    for run in runs:
        assert (run.summary["status"], run.summary["processes"]) == ("finished", 1)
        assert run.charged == list(range(STEPS))
    logs = [Path(point["log"]).read_text() for point in again["points"]]
    assert ["dpdist job: preempted; requeued" in log for log in logs] == [False, False, True]
    assert all(log.rstrip().endswith("dpdist job: done") for log in logs)
    assert len({(run.root / "private/secret.key").read_bytes() for run in runs}) == 3
    single = runs[0].summary["epsilon"]
    assert again["composed"]["points"] == 3
    assert single < again["composed"]["epsilon"] < 3 * single
    assert "choosing the best of the sweep costs the composed epsilon" in table
