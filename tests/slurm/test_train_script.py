"""`sbatch slurm/train_80gpu.sh`, unedited: 80 processes, all ways to be told to leave, other nodes, dead ranks."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from batch import LIMIT, REPOSITORY, SCRIPT, Batch, sbatch
from forks import fork_server
from jobs import STEPS, Jobs, Run, wait_all, wait_for

from dpdist_launch.cli import main

#: Seconds within which a job begins again after the death of a rank: less than the KillWait SLURM gives the others.
BOUND_AFTER_A_DEATH = 25.0
#: What changes from one start of a run to the next, or with where it runs.
VOLATILE = {"examples_per_second", "tflops_per_device", "seconds_to_first_step", "goodput"}
#: What a rank of `dpdist train configs/digits.yaml` imports.
IMPORTS = (
    "dpdist_launch.training",
    "dpdist.mechanism.accounting",
    "dpdist.run.plots",
    "flax.nnx",
    "sklearn.datasets",
)
#: Of jobs: each has a log of its own.
NUMBERS = itertools.count()


def start(
    slurm: dict[str, str],
    jobs: Jobs,
    run: Run,
    *overrides: str,
    nodes: int = 2,
    tasks: int = 1,
    options: tuple[str, ...] = (),
    **environ: str,
) -> Batch:
    """Train the tests' own small model under SLURM."""
    return sbatch(
        slurm,
        SCRIPT,
        str(jobs.config),
        "--run-dir",
        str(run.root),
        *overrides,
        nodes=nodes,
        tasks_per_node=tasks,
        log=run.root.with_suffix(f".{next(NUMBERS)}.log"),
        options=("--cpus-per-task=1", *options),
        cwd=jobs.root,
        NPROC="1",
        **environ,
    )


class Pace:
    """Something is slow until the test says `off`: a variable of the job names the file that holds the seconds."""

    def __init__(self, run: Run, name: str, seconds: float) -> None:
        self.file = run.root.with_suffix(".pace")
        self.file.write_text(str(seconds))
        self.environ = {name: str(self.file)}

    def off(self) -> None:
        self.file.unlink()


def stable(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.summary.items() if name not in VOLATILE}


@dataclass
class Observed:
    """What `dpdist status` and `dpdist logs` print, here and now."""

    capsys: pytest.CaptureFixture[str]

    def status(self, run: Run) -> dict[str, Any]:
        assert main(["status", str(run.root), "--json"]) == 0
        (seen,) = json.loads(self.capsys.readouterr().out.splitlines()[-1])["runs"]
        return seen

    def log(self, run: Run, *, rank: int) -> tuple[str, str]:
        assert main(["logs", str(run.root), "--rank", str(rank)]) == 0
        told = self.capsys.readouterr()
        return told.out, told.err


@pytest.fixture
def observed(slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Observed:
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    return Observed(capsys)


@pytest.fixture(scope="module")
def two_processes(jobs: Jobs) -> Run:
    """The undisturbed run on two processes of one device, started without SLURM."""
    run = jobs.new("2x1")
    wait_all(jobs.ranks(run, 2, 1))
    return run


def test_eighty_processes_on_twenty_nodes(slurm: dict[str, str], jobs: Jobs) -> None:
    settings = (
        "cluster.devices_per_process=1",
        "privacy.insecure_seed=1",
        "training.record_digests=true",
        "training.steps=4",
        "training.physical_batch_size=16",
        "checkpoint.every_steps=4",
        "run.log_every=1",
    )
    # Eighty processes compile on the cores of one machine; what they compile need not be fast.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "NPROC": "1"}
    run, alone = jobs.new("80"), jobs.new("digits-alone")
    began = time.monotonic()
    with fork_server(jobs.root, jobs.environ | quick, *IMPORTS) as dpdist:
        batch = sbatch(
            slurm,
            SCRIPT,
            "configs/digits.yaml",
            "--run-dir",
            str(run.root),
            *settings,
            nodes=20,
            tasks_per_node=4,
            log=run.root.with_suffix(".log"),
            DPDIST=str(dpdist),
            **quick,
        )
        assert batch.wait(3 * LIMIT) == "COMPLETED", batch.text
    print(f"80 processes: {time.monotonic() - began:.0f} s from submission to the end")
    summary = run.summary
    assert (summary["status"], summary["processes"], summary["devices"]) == ("finished", 80, 80)
    command = [sys.executable, "-m", "launch", "train", "configs/digits.yaml", *settings, "--run-dir", str(alone.root)]
    # Not a fork of a Python that has read another environment: XLA rounds the noise as it optimises.
    subprocess.run(command, cwd=REPOSITORY, env=jobs.environ | quick, check=True, timeout=LIMIT)
    assert summary["epsilon"] == alone.summary["epsilon"]
    assert summary["params_sha256"] == alone.summary["params_sha256"]  # eighty devices, or one: not a bit differs
    assert run.digests == alone.digests
    assert len(run.digests) == 4
    assert "80 processes on n[01-20]" in batch.text
    assert batch.text.splitlines()[-1] == "dpdist job: done"


def test_told_to_leave_in_three_ways_it_ends_as_if_undisturbed(
    slurm: dict[str, str], jobs: Jobs, four_processes: Run
) -> None:
    """A time limit, `scontrol requeue`, and TERM from outside, as preemption sends it; side by side, to save time."""
    # SLURM looks at time limits every half minute, so it warns 60 to 90 s after the start.
    ways = {"limit": ("--time=2", "--signal=TERM@30"), "requeue": (), "term": ()}
    runs = {way: jobs.new(f"left-{way}") for way in ways}
    paces = {way: Pace(runs[way], "PACE", 6.0 if way == "limit" else 1.5) for way in ways}
    batches: dict[str, Batch] = {}
    for way, options in ways.items():
        batches[way] = start(
            slurm, jobs, runs[way], "data.prefetch=1", tasks=2, options=options, DPDIST_GRACE="30", **paces[way].environ
        )
        if way != "limit":
            batches[way].wait_for_step(runs[way], 1)
            command = {"requeue": ("scontrol", "requeue"), "term": ("scancel", "--signal=TERM")}[way]
            batches[way].ask(*command, batches[way].id)
    for way, batch in batches.items():
        batch.wait_until_requeued()
        assert runs[way].summary["status"] == "preempted", f"{way}: {batch.text}"
        assert runs[way].summary["step"] in range(0 if way == "limit" else 2, STEPS)
        assert runs[way].summary["step"] == runs[way].checkpoints[-1]
        paces[way].off()
        batch.start_again()
    for way, batch in batches.items():
        assert batch.wait() == "COMPLETED", batch.text
        assert stable(runs[way]) == stable(four_processes), way
        assert runs[way].digests == four_processes.digests
        assert runs[way].accuracies == four_processes.accuracies
        assert batch.text.count("+ job") == 2


@pytest.mark.parametrize(
    ("slow", "seconds", "overrides"),
    [
        ("PACE_START", 8.0, ()),
        ("PACE_TEST", 2.0, ("training.evaluation_batch_size=4",)),
        ("PACE", 0.5, ("checkpoint.every_steps=1",)),
    ],
    ids=["start-up", "evaluation", "checkpointing"],
)
def test_told_to_leave_in_the_midst_of(
    slurm: dict[str, str], jobs: Jobs, two_processes: Run, slow: str, seconds: float, overrides: tuple[str, ...]
) -> None:
    run = jobs.new(f"left-{slow}")
    pace = Pace(run, slow, seconds)
    batch = start(slurm, jobs, run, "data.prefetch=1", "training.evaluate_every=4", *overrides, **pace.environ)
    if slow == "PACE_START":
        batch.wait_for_text("epsilon")  # joined and planned; now come the initial parameters
    else:
        # Step 4 is saved; its evaluation goes on for a minute. Or saving begins anew after every step.
        wait_for(lambda: (run.root / "checkpoints" / "4").exists(), LIMIT, every=0.02)
    batch.leave()
    preempted = run.summary
    assert preempted["status"] == "preempted", batch.text
    assert preempted["step"] in {"PACE_START": (0,), "PACE_TEST": (4,), "PACE": range(4, STEPS)}[slow]
    assert preempted["step"] == run.checkpoints[-1]
    pace.off()
    batch.start_again()
    assert batch.wait() == "COMPLETED", batch.text
    assert stable(run) == stable(two_processes)
    assert run.digests == two_processes.digests
    assert run.accuracies == two_processes.accuracies


def test_resumed_on_fewer_and_on_more_nodes_it_ends_with_the_same_bits(
    slurm: dict[str, str], jobs: Jobs, two_processes: Run
) -> None:
    run = jobs.new("4x2-2x1-3x1")
    for nodes, tasks, step in ((4, 2, 3), (2, 1, 8)):
        pace = Pace(run, "PACE", 0.7)
        batch = start(slurm, jobs, run, "data.prefetch=1", nodes=nodes, tasks=tasks, **pace.environ)
        batch.wait_for_step(run, step)
        batch.leave()
        batch.ask("scancel", batch.id)
        pace.off()
    batch = start(slurm, jobs, run, nodes=3)
    assert batch.wait() == "COMPLETED", batch.text
    assert (run.summary["status"], run.summary["processes"]) == ("finished", 3)
    assert run.digests == two_processes.digests
    for key in ("epsilon_spent", "incarnation", "params_sha256"):
        assert run.summary[key] == two_processes.summary[key], key
    assert sorted(run.charged) == list(range(STEPS))


@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_death_of_a_rank_the_job_starts_again_by_itself(
    slurm: dict[str, str], jobs: Jobs, two_processes: Run, rank: int, observed: Observed
) -> None:
    """And what its owner sees of it meanwhile, by `dpdist status` and `dpdist logs`."""
    run = jobs.new(f"killed-{rank}")
    pace = Pace(run, "PACE", 0.5)
    batch = start(slurm, jobs, run, "data.prefetch=1", **pace.environ)
    batch.wait_for_step(run, 5)
    seen = observed.status(run)
    assert (seen["state"], seen["job"], len(seen["nodes"])) == ("RUNNING", batch.id, 2)
    os.kill(batch.tasks()[rank], signal.SIGKILL)
    killed = time.monotonic()
    batch.wait_for_text("all nodes answer, so it starts again on them")
    took = time.monotonic() - killed
    assert took < BOUND_AFTER_A_DEATH
    print(f"the job began again {took:.1f} s after rank {rank} was killed")
    pace.off()
    assert batch.wait() == "COMPLETED", batch.text
    assert re.search(rf"task {rank} on n\d+: Killed; all nodes answer", batch.text), batch.text
    assert batch.text.count("+ job") == 1
    assert stable(run) == stable(two_processes)
    assert run.digests == two_processes.digests
    seen = observed.status(run)
    assert (seen["state"], seen["restarts"], seen["error"]) == ("finished", 1, None)
    assert seen["goodput"]["queue_hours"] is not None
    log, told = observed.log(run, rank=0)
    assert "finished at step" in log
    assert "Gloo" not in log
    assert told == f"rank 0 = {seen['nodes'][0]} local 0\nlog: {batch.log}\n"
    assert "finished at step" not in observed.log(run, rank=1)[0]


def test_a_job_that_waits_is_seen_before_it_has_a_directory(
    slurm: dict[str, str], jobs: Jobs, observed: Observed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = jobs.new("held")
    ours = ("config.yaml", "--run-dir", str(run.root), "training.steps=6")
    sent = [
        subprocess.run(
            ["sbatch", "--parsable", "--hold", "--nodes=1", "--output=/dev/null", *command],
            cwd=REPOSITORY,
            env=os.environ | slurm,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for command in ((str(SCRIPT), *ours), (str(SCRIPT),), ("--wrap=true",))
    ]
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["status", "--json"]) == 0
        mine, default = json.loads(observed.capsys.readouterr().out)["coming"]
        assert (mine["number"], mine["reason"], mine["run_dir"]) == (sent[0], "JobHeldUser", str(run.root))
        assert (default["number"], default["command"], default["run_dir"]) == (sent[1], SCRIPT.name, None)
        assert main(["status", str(run.root)]) == 0
        shown = observed.capsys.readouterr().out
        assert f"job {sent[0]} waits: JobHeldUser\n        train_80gpu.sh config.yaml --run-dir" in shown
        assert sent[1] not in shown
        assert main(["status", str(tmp_path / "another")]) == 2
        assert "there is no such directory, and no job in the queue names it" in observed.capsys.readouterr().err
    finally:
        subprocess.run(["scancel", *sent], env=os.environ | slurm, check=True)


def test_a_notice_to_the_batch_shell_or_by_another_signal_saves_too(
    slurm: dict[str, str], jobs: Jobs, two_processes: Run
) -> None:
    """`--signal=B:TERM@...` and `--signal=USR1@...`, and srun passes the site file's exports on with --export=NONE."""
    run = jobs.new("left-by-shell")
    pace = Pace(run, "PACE", 0.5)
    site = run.root.with_suffix(".site.sh")
    site.write_text("export PYTHONPATH=$SITE_PYTHONPATH PACE=$SITE_PACE NPROC=1\n")
    environ = {"DPDIST_SITE": str(site), "SITE_PACE": pace.environ["PACE"], "SITE_PYTHONPATH": str(REPOSITORY)}
    names = ",".join([*environ, "DPDIST_HOME", "DPDIST", "PATH"])
    batch = start(slurm, jobs, run, "data.prefetch=1", options=(f"--export={names}",), **environ)
    batch.wait_for_step(run, 2)
    batch.ask("scancel", "--batch", "--signal=TERM", batch.id)
    batch.wait_until_requeued()
    assert "told to leave by SIGTERM; all ranks are told" in batch.text
    assert run.summary["status"] == "preempted"
    batch.start_again()
    later = run.summary["step"] + 2
    wait_for(lambda: any(record["step"] >= later for record in run.diagnostics), LIMIT, every=0.05)
    batch.ask("scancel", "--signal=USR1", batch.id)
    batch.wait_until_requeued()
    assert run.summary["status"] == "preempted", batch.text
    pace.off()
    batch.start_again()
    assert batch.wait() == "COMPLETED", batch.text
    assert stable(run) == stable(two_processes)


def test_a_cancelled_job_says_so_last(slurm: dict[str, str], jobs: Jobs) -> None:
    run = jobs.new("cancelled")
    batch = start(slurm, jobs, run, "data.prefetch=1", **Pace(run, "PACE", 0.5).environ)
    batch.wait_for_step(run, 2)
    batch.ask("scancel", batch.id)
    assert batch.wait() == "CANCELLED"
    wait_for(lambda: "dpdist job:" in batch.text, 30, every=0.2)
    assert (
        "cancelled (scancel, or by an administrator)"
        in [line for line in batch.text.splitlines() if line.startswith("dpdist job:")][-1]
    )
