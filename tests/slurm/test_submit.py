"""`dpdist submit` and `launch.submit`: from a config to its summary, by way of the queue."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch import start_requeued
from jobs import STEPS, Jobs, Run, wait_for

from dpdist.errors import InputError
from launch import JobFailedError, TrainingJob, attach, submit


def submitted(jobs: Jobs, run: Run, *, nodes: int = 2, tasks_per_node: int = 1, **overrides: Any) -> TrainingJob:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return submit(
        jobs.config,
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=1,
        overrides={"run.dir": run.root} | named,
    )


def test_the_python_call_trains_on_eight_processes_and_returns_the_summary(cluster: Jobs) -> None:
    run = cluster.new("submit")
    job = submitted(cluster, run, nodes=4, tasks_per_node=2)
    assert job.id in repr(job)
    assert any(state in repr(job) for state in ("PENDING", "RUNNING"))
    with pytest.raises(InputError, match=f"job {job.id} .* is on this run already"):
        submitted(cluster, run)
    found = attach(run.root)
    assert found is not None
    assert found.id == job.id
    summary = found.result(poll_seconds=0.5)
    assert summary == run.summary
    assert (summary["status"], summary["processes"], summary["step"]) == ("finished", 8, STEPS)
    assert "finished at step" in job.log().read_text()
    assert job.log(7).exists()
    assert "wckey" not in (job.folder / f"{job.id}_submission.sh").read_text()
    # Done already: a second job for the run has nothing to do and says the same.
    assert submitted(cluster, run).result(poll_seconds=0.5) == summary


def test_a_job_from_a_directory_of_files_with_the_names_of_modules(
    cluster: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks find the user's own module there, and run ours."""
    for file in (cluster.config, cluster.root / "userland.py"):
        shutil.copy(file, tmp_path)
    for name in ("launch.py", "dpdist_launch.py", "submitit.py", "json.py", "jax.py"):
        (tmp_path / name).write_text(f"import os\nopen({str(tmp_path / 'RAN')!r}, 'w')\nos._exit(0)\n")
    monkeypatch.chdir(tmp_path)
    overrides = {"run.dir": "run", "training.steps": 2}
    job = submit("base.yaml", nodes=2, cpus_per_task=1, overrides=overrides)
    summary = job.result(poll_seconds=0.5)
    assert (summary["status"], summary["step"], summary["processes"]) == ("finished", 2, 2)
    assert not (tmp_path / "RAN").exists()


def test_tasks_that_return_0_and_have_trained_nothing_have_failed(
    cluster: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cluster.new("submit-idle")
    monkeypatch.setattr("dpdist_launch.slurm.script.PYTHON", ("true",))
    with pytest.raises(JobFailedError, match=r"is FAILED: .*all processes returned 0, but"):
        submitted(cluster, run).result(poll_seconds=0.5)


def test_the_command_follows_the_job_to_its_end(cluster: Jobs) -> None:
    run = cluster.new("submit-follow")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launch", "submit", str(cluster.config), "--nodes", "2"),
            *("--cpus-per-task", "1", "--follow", "--run-dir", str(run.root)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, last = (json.loads(line) for line in done.stdout.splitlines())
    assert first["run_dir"] == str(run.root)
    assert last == run.summary
    assert f"job {first['job']}: COMPLETED" in done.stderr
    assert "finished at step" in done.stderr


def test_a_preempted_job_comes_back_by_itself_and_result_waits_for_it(cluster: Jobs) -> None:
    run = cluster.new("submit-preempted")
    file = run.root.with_suffix(".pace")
    file.write_text("1")
    os.environ["PACE"] = str(file)
    job = submitted(cluster, run, data__prefetch=1)
    wait_for(lambda: any(record["step"] >= 2 for record in run.diagnostics), every=0.1)
    subprocess.run(["scancel", "--signal=TERM", job.id], check=True)
    wait_for(lambda: (run.root / "summary.json").exists() and job.state() == "PENDING", every=0.1)
    assert run.summary["status"] == "preempted"
    assert not job.ended()
    file.unlink()
    start_requeued(job.id, os.environ)
    summary = job.result(poll_seconds=0.5)
    assert (summary["status"], summary["step"]) == ("finished", STEPS)
    assert "dpdist job: preempted; requeued (start 1" in job.log().read_text()


def test_a_start_that_nobody_could_tell_of_is_told_by_the_next(cluster: Jobs) -> None:
    run = cluster.new("submit-silent")
    file = run.root.with_suffix(".pace")
    file.write_text("1")
    os.environ["PACE"] = str(file)
    job = submitted(cluster, run, data__prefetch=1)
    wait_for(lambda: any(record["step"] >= 2 for record in run.diagnostics), every=0.1)
    # The batch script and the ranks, as by the death of their nodes.
    daemons = subprocess.run(["pgrep", "-f", rf"^slurmstepd: \[{job.id}\."], capture_output=True, text=True, check=True)
    for daemon in daemons.stdout.split():
        subprocess.run(["pkill", "-KILL", "-P", daemon], check=False)
    wait_for(job.ended, every=0.2)
    file.unlink()
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    start_requeued(job.id, os.environ)
    assert job.result(poll_seconds=0.5)["status"] == "finished"
    assert "start 0 ended without a last line" in job.log().read_text()
    assert job.log().read_text().count(f"+ job {job.id}, start ") == 2


def test_a_failing_job_raises_with_what_the_failing_rank_said(cluster: Jobs) -> None:
    run = cluster.new("submit-failing")
    job = submitted(cluster, run, data__source="userland:failing", data__options={"index": 500})
    with pytest.raises(JobFailedError) as raised:
        job.result(poll_seconds=0.5)
    text = str(raised.value)
    assert f"job {job.id} is FAILED" in text
    assert "dpdist: failed with" in text
    assert str(run.root / "private/logs/rank-") in text
    assert "Alice" not in text  # what an exception quotes stays under private/logs
    assert "Alice" in run.logs


def test_bad_input_found_by_the_job_is_the_cause_that_is_raised(cluster: Jobs) -> None:
    job = submitted(cluster, cluster.new("submit-bad"), data__source="npy", data__path=cluster.root)
    with pytest.raises(JobFailedError, match=r"(?s)dpdist: error: data\.path = "):
        job.result(poll_seconds=0.5)


def test_a_cancelled_job_says_so(cluster: Jobs) -> None:
    run = cluster.new("submit-cancelled")
    job = submitted(cluster, run)
    job.cancel()
    with pytest.raises(JobFailedError, match=f"job {job.id} is CANCELLED"):
        job.result(poll_seconds=0.5)


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        ({"nodes": 0}, "--nodes", "at least 1"),
        ({"nodes": 1, "gpus_per_node": -1}, "--gpus-per-node", "at least 1"),
        ({"nodes": 1, "gpus_per_node": 2, "tasks_per_node": 3}, "--tasks-per-node", "a GPU of its own"),
        ({"nodes": 1, "sbatch": {"partition": "nowhere"}}, "sbatch", "invalid partition"),
        ({"nodes": 1, "site": "/nowhere/site.sh"}, "--site", "site.example.sh"),
        ({"nodes": 1, "overrides": {"privacy.delta": 2}}, "privacy.delta", "between 0 and 1"),
        ({"nodes": 1, "overrides": {"run.dir": "/proc/nowhere"}}, "run.dir", "name another directory"),
        ({"nodes": 1, "sbatch": {"constraint": "volta"}}, "sbatch", "Invalid feature specification"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_queued(
    cluster: Jobs, request_: dict[str, Any], field: str, text: str
) -> None:
    settings = {"run.dir": str(cluster.new("refused").root)} | request_.pop("overrides", {})
    with pytest.raises(InputError, match=text) as raised:
        submit(cluster.config, overrides=settings, **request_)
    assert raised.value.field == field
    queue = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True)
    assert queue.stdout == ""


def test_the_site_file_reaches_sbatch_and_the_job_and_options_win_over_it(cluster: Jobs, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_PARTITION=nowhere\necho a module says hello\nexport JAX_TEST_OF_SITE=1\n")
    with pytest.raises(InputError, match="invalid partition"):
        submit(cluster.config, nodes=1, overrides={"run.dir": str(cluster.new("site").root)}, site=site)
    job = submit(
        cluster.config,
        nodes=1,
        cpus_per_task=1,
        overrides={"run.dir": str(cluster.new("site").root), "training.steps": 2},
        site=site,
        sbatch={"partition": "virtual"},
    )
    assert job.result(poll_seconds=0.5)["status"] == "finished"
    assert "a module says hello" in (job.folder / f"{job.id}_0_log.out").read_text()
