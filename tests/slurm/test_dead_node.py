"""A node loses its power: its slurmd, slurmstepd and rank stop, and nobody is told. The run goes on without it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch import SCRIPT, Batch, sbatch
from jobs import Jobs, Run, wait_all

#: Of JAX in these jobs, and of the question to the nodes, in seconds; the defaults are 100 and 20.
HEARTBEAT, PROBE = 10, 4


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Run:
    run = jobs.new("undisturbed")
    wait_all(jobs.ranks(run, 2, 1))
    return run


@contextlib.contextmanager
def without_power(batch: Batch, node: str, rank: int) -> Iterator[None]:
    """All processes of a node are stopped: they neither answer nor close a connection."""
    cluster = Path(batch.slurm["SLURM_CONF"]).parent
    pids = [int((cluster / f"{node}.pid").read_text()), batch.tasks()[rank]]
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (directory / "cmdline").read_text().startswith(f"slurmstepd: [{batch.id}."):
                logs = [str(file.readlink()) for file in (directory / "fd").iterdir()]
                pids += [int(directory.name)] * any(name.endswith(f"/log/{node}.log") for name in logs)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def train(slurm: dict[str, str], jobs: Jobs, run: Run, nodes: int, **environ: str) -> tuple[Batch, list[str], Path]:
    """A slow run after step 5, its nodes, and the file that makes it slow."""
    pace = run.root.with_suffix(".pace")
    pace.write_text("0.5")
    batch = sbatch(
        slurm,
        SCRIPT,
        str(jobs.config),
        *("--run-dir", str(run.root), "data.prefetch=1", f"cluster.heartbeat_timeout={HEARTBEAT}"),
        nodes=nodes,
        tasks_per_node=1,
        log=run.root.with_suffix(".log"),
        options=("--cpus-per-task=1", "--gpus-per-node=1"),
        cwd=jobs.root,
        NPROC="1",
        PACE=str(pace),
        DPDIST_PROBE_SECONDS=str(PROBE),
        **environ,
    )
    batch.wait_for_step(run, 5)
    return batch, batch.ask("scontrol", "show", "hostnames", field(batch, "NodeList")).split(), pace


def field(batch: Batch, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", batch.ask("scontrol", "show", "job", "--oneliner", batch.id))
    assert found is not None
    return found[1]


def test_the_job_goes_on_with_the_nodes_that_are_left(slurm: dict[str, str], jobs: Jobs, undisturbed: Run) -> None:
    run = jobs.new("dead-node")
    batch, nodes, pace = train(slurm, jobs, run, 3, DPDIST_MIN_NODES="2")
    with without_power(batch, nodes[1], 1):
        pace.unlink()
        assert batch.wait() == "COMPLETED", batch.text
    assert f"task 1 on {nodes[1]} stopped answering (no heartbeat); {nodes[1]} does not answer" in batch.text
    assert batch.text.splitlines()[-1] == "dpdist job: done"
    assert (run.summary["status"], run.summary["processes"]) == ("finished", 2)
    assert run.summary["params_sha256"] == undisturbed.summary["params_sha256"]
    assert run.digests == undisturbed.digests
    assert batch.text.count("+ job") == 1  # it never went back to the queue


def test_the_job_is_requeued_without_the_dead_node(slurm: dict[str, str], jobs: Jobs, undisturbed: Run) -> None:
    run = jobs.new("dead-node-requeued")
    batch, nodes, pace = train(slurm, jobs, run, 2)
    with without_power(batch, nodes[1], 1):
        batch.wait_for_text(f"requeued without {nodes[1]}")
        pace.unlink()
        batch.wait_until_excluded(nodes[1])
    batch.wait_until_requeued()
    batch.start_again()
    assert batch.wait() == "COMPLETED", batch.text
    assert nodes[1] not in batch.ask("scontrol", "show", "hostnames", field(batch, "NodeList")).split()
    assert run.summary["params_sha256"] == undisturbed.summary["params_sha256"]
    assert run.digests == undisturbed.digests
