"""A node loses its power: its slurmd, slurmstepd and rank stop, and nobody is told. The run goes on without it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from batch import LIMIT, SCRIPT, Batch, sbatch
from jobs import Jobs, Run, children, wait_for

#: Of JAX in these jobs, and of the question to the nodes, in seconds; the defaults are 100 and 20.
HEARTBEAT, PROBE = 10, 4
PHASES = Path(__file__).parents[1] / "faults" / "phases.py"


def processes_of(batch: Batch, node: str) -> list[int]:
    """A node's slurmd, and all that it has started for the job."""
    slurmd = int((Path(batch.slurm["SLURM_CONF"]).parent / f"{node}.pid").read_text())
    return [slurmd, *(pid for daemon in batch.daemons(node, r"\w+") for pid in below(daemon))]


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    return [pid, *(found for child in children(pid) for found in below(child))]


@contextlib.contextmanager
def without_power(batch: Batch, node: str) -> Iterator[list[int]]:
    """All processes of a node are stopped: they neither answer nor close a connection."""
    pids = processes_of(batch, node)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def nodes_of(batch: Batch) -> list[str]:
    found = re.search(r"\bNodeList=(\S+)", batch.ask("scontrol", "show", "job", "--oneliner", batch.id))
    assert found is not None
    return batch.ask("scontrol", "show", "hostnames", found[1]).split()


def test_nodes_die_at_start_up_and_in_a_step_and_in_a_save_and_the_run_goes_on_without_them(
    slurm: dict[str, str], jobs: Jobs, four_processes: Run
) -> None:
    """At first all of three are needed, so that it is requeued without the dead one; then one is enough."""
    shutil.copy(PHASES, jobs.root)
    run, gate = jobs.new("dead-nodes"), jobs.new("gate").root
    gate.mkdir()
    step, start_up, site = (run.root.with_suffix(f".{name}") for name in ("pace", "pace-start", "site.sh"))
    step.write_text("0.5")
    start_up.write_text("6")
    site.write_text("true\n")
    held = {"FAULT_PHASE": "save middle", "FAULT_RANK": "1", "FAULT_AT": "6", "FAULT_DIR": str(gate)}
    batch = sbatch(
        slurm,
        SCRIPT,
        str(jobs.config),
        *("--run-dir", str(run.root), "data.prefetch=1", f"cluster.heartbeat_timeout={HEARTBEAT}"),
        "data.source=phases:arrays",
        nodes=3,
        tasks_per_node=1,
        log=run.root.with_suffix(".log"),
        options=("--cpus-per-task=1", "--gpus-per-node=1"),
        cwd=jobs.root,
        NPROC="1",
        **{"PACE": str(step), "PACE_START": str(start_up), "DPDIST_SITE": str(site)},
        DPDIST_PROBE_SECONDS=str(PROBE),
        **held,
    )

    @contextlib.contextmanager
    def lost(rank: int, *slow: Path, then: str) -> Iterator[None]:
        """The node of a rank is without power, and nothing is `slow` any more."""
        began, node = time.monotonic(), nodes_of(batch)[rank]
        with without_power(batch, node):
            for file in slow:
                file.unlink()
            batch.wait_for_text(
                f"task {rank} on {node} stopped answering (no heartbeat); {node} does not answer; {then}"
            )
            print(f"{then!r} {time.monotonic() - began:.0f} s after the loss of a node")
            yield

    batch.wait_for_text("epsilon")  # joined and planned; now come the initial parameters
    dead = nodes_of(batch)[2]
    with lost(2, start_up, then=f"requeued without {dead}"):
        batch.wait_until_excluded(dead)
    site.write_text("export DPDIST_MIN_NODES=1\n")
    batch.wait_until_requeued()
    batch.start_again()
    wait_for(lambda: batch.text.count("+ job") == 2, LIMIT, every=0.1)
    batch.wait_for_step(run, 5)
    assert dead not in nodes_of(batch)
    with lost(2, step, then="it starts again on the other 2 nodes"):
        reached = gate / "save middle.1.reached"
        reached.unlink(missing_ok=True)
        wait_for(reached.exists, LIMIT, every=0.05)
        with lost(1, then="it starts again on the other node"):
            batch.wait_for_text("dpdist job: done")
    assert batch.wait() == "COMPLETED", batch.text
    assert batch.text.count("+ job") == 2  # it was in the queue once
    assert "without a last line" not in batch.text
    assert (run.summary["status"], run.summary["processes"]) == ("finished", 1)
    assert run.summary["params_sha256"] == four_processes.summary["params_sha256"]
    assert run.digests == four_processes.digests


def test_the_first_node_dies_with_the_batch_script_and_slurm_requeues_the_job(
    slurm: dict[str, str], jobs: Jobs, four_processes: Run
) -> None:
    """Rank 0 is not dead yet when the next start comes, as on a node that SLURM alone cannot reach any more."""
    run = jobs.new("first-node")
    step = run.root.with_suffix(".pace")
    step.write_text("0.5")
    batch = sbatch(
        slurm,
        SCRIPT,
        str(jobs.config),
        *("--run-dir", str(run.root), "data.prefetch=1"),
        nodes=2,
        tasks_per_node=1,
        log=run.root.with_suffix(".log"),
        options=("--cpus-per-task=1", "--gpus-per-node=1"),
        cwd=jobs.root,
        NPROC="1",
        PACE=str(step),
    )
    batch.wait_for_step(run, 5)
    first, (rank_0, rank_1) = nodes_of(batch)[0], [batch.tasks()[rank] for rank in range(2)]
    with powered_again(batch, first), without_power(batch, first) as pids:
        # What SLURM does to a node after SlurmdTimeout, without the wait for it.
        batch.ask("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=test")
        for pid in pids:
            if rank_0 not in below(pid):
                os.kill(pid, signal.SIGKILL)
        os.kill(rank_1, signal.SIGKILL)  # as SLURM would after KillWait, 30 s
        batch.wait_until_requeued()
        step.unlink()
        batch.ask("scontrol", "update", f"JobId={batch.id}", "StartTime=now+1")
        batch.wait_for_text("start 0 ended without a last line")
        batch.wait_for_text(f"waiting for process {rank_0} on ")
        os.kill(rank_0, signal.SIGKILL)
        assert batch.wait() == "COMPLETED", batch.text
        assert first not in nodes_of(batch)
    assert batch.text.splitlines()[-1] == "dpdist job: done"
    assert run.summary["params_sha256"] == four_processes.summary["params_sha256"]
    assert run.digests == four_processes.digests


@contextlib.contextmanager
def powered_again(batch: Batch, node: str) -> Iterator[None]:
    """At the end the node is what it was: ReturnToService=2 takes it back once its slurmd registers."""
    try:
        yield
    finally:
        batch.ask("slurmd", "-f", batch.slurm["SLURM_CONF"], "-N", node)
        wait_for(lambda: "idle" in batch.ask("sinfo", "--noheader", f"--nodes={node}", "--format=%T"), 60, every=0.2)
