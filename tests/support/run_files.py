"""Run directories as runs leave them, written by hand: for what reads them without training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist.cluster.holder import Holder
from dpdist.run import events
from dpdist.run.goodput import PHASES
from dpdist.run.layout import RunPaths
from dpdist.run.ranks import Ranks

PLAN = {
    "record": "plan", "incarnation": 0, "steps": 100, "steps_asked": 100, "expected_batch_size": 64.0, "start": 0,
    "target_epsilon": 3.0, "epsilon": 2.99,
}  # fmt: skip


def write_run(
    root: Path,
    *,
    step: int | None = None,
    status: str | None = None,
    told: Sequence[dict[str, Any]] = (),
    nodes: Sequence[str] = ("n1",),
    job: str | None = None,
    log: Path | None = None,
    alive: bool | None = None,
) -> RunPaths:
    """A run of 100 steps, 2 s each.

    Args:
        step: as far as the metrics go.
        status: of the summary; None writes none.
        told: its events, without their times.
        alive: whether the holder of the lease lives; None has released it.
    """
    run = RunPaths(root)
    run.logs.mkdir(parents=True)
    run.ledger.write_text(json.dumps(PLAN) + "\n")
    run.config.write_text("{}\n")
    metrics = [
        {"step": n, "epsilon": n / 50, "examples_per_second": 32.0, "seconds": 2.0 * n} for n in range(10, 101, 10)
    ]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in metrics if record["step"] <= (step or 0)))
    if status is not None:
        run.summary.write_text(json.dumps({"status": status, "step": step, "epsilon_spent": (step or 0) / 50}))
    for event in told:
        events.append(run.events, {"time": "2026-11-27T07:00:00Z"} | event)
    environ = {"SLURM_JOB_ID": job} if job else {}
    placed = Ranks.of_this_job(list(nodes), environ | ({"DPDIST_LOG": str(log)} if log else {}))
    run.ranks.write_text(placed.to_json())
    seconds = dict.fromkeys(PHASES, 0.0) | {"start_up": 900.0, "training": 8100.0}
    record = {"node_seconds": seconds, "waiting": 81.0, "queue_seconds": 60.0, "nodes": 1, "closed": True, "saves": []}
    run.goodput.write_text(json.dumps(record))
    holder = Holder.of_this_process(run.private, 60.0)
    dead = {"released": True} if alive is None else {} if alive else {"pid": 2**22 + 1}
    (run.private / "lease.3").write_bytes(Holder(**{**vars(holder), **dead}).encode())
    return run


def fake_command(folder: Path, name: str, script: str) -> None:
    """A command in `folder` that is a shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def first_on_path(folder: Path) -> str:
    """A PATH that finds the commands in `folder` first."""
    return os.pathsep.join([str(folder), os.environ["PATH"]])
