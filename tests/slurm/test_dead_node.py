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

import pytest
from batch import LIMIT, SCRIPT, Batch, sbatch
from jobs import Jobs, Run, wait_all, wait_for

#: Of JAX in these jobs, and of the question to the nodes, in seconds; the defaults are 100 and 20.
HEARTBEAT, PROBE = 10, 4
PHASES = Path(__file__).parents[1] / "faults" / "phases.py"


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


def nodes_of(batch: Batch) -> list[str]:
    found = re.search(r"\bNodeList=(\S+)", batch.ask("scontrol", "show", "job", "--oneliner", batch.id))
    assert found is not None
    return batch.ask("scontrol", "show", "hostnames", found[1]).split()


def test_nodes_die_at_start_up_and_in_a_step_and_in_a_save_and_the_run_goes_on_without_them(
    slurm: dict[str, str], jobs: Jobs, undisturbed: Run
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
        with without_power(batch, node, rank):
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
    assert (run.summary["status"], run.summary["processes"]) == ("finished", 1)
    assert run.summary["params_sha256"] == undisturbed.summary["params_sha256"]
    assert run.digests == undisturbed.digests
