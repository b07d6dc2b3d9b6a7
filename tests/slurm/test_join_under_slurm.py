"""Joining a job as the tasks of a real SLURM step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from batch import LIMIT, sbatch
from jobs import wait_for

ALL_REDUCE = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpdist.cluster import agreement
from dpdist.cluster.join import join, leave
from dpdist.config import Cluster

job = join(Cluster(platform="cpu", devices_per_process=1, initialization_timeout=120, shutdown_timeout=60))
sharding = NamedSharding(job.mesh, PartitionSpec("data"))
x = jax.make_array_from_callback((8, 5), sharding, lambda index: np.full((1, 5), 1.0 + index[0].start))
total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(job.mesh, PartitionSpec()))(x)
agreement.require_same({"total": float(total[0])}, job)
me = job.membership
print("REPORT", json.dumps({
    "rank": me.process_id, "size": me.num_processes, "host": me.host_index, "hosts": job.host_of_device,
    "launcher": me.launcher, "coordinator": me.coordinator_address, "total": float(total[0]),
}), flush=True)
leave()
"""
# Imports no JAX, so that a step costs a second.
DETECT = """
import dataclasses, json, os
from dpdist.cluster.environment import detect
from dpdist.cluster.step_daemon import step_of_process
print("REPORT", json.dumps(dataclasses.asdict(detect(os.environ, step=step_of_process()))), flush=True)
"""


def reports(output: str) -> list[dict[str, Any]]:
    lines = (line for line in output.splitlines() if line.startswith("REPORT "))
    found = [json.loads(line.removeprefix("REPORT ")) for line in lines]
    return sorted(found, key=lambda report: report.get("rank", report.get("process_id")))


def srun(slurm: dict[str, str], program: str, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=2", *options, sys.executable, "-c", program],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return reports(done.stdout)


def test_eight_tasks_on_four_nodes_form_one_job_and_reduce(slurm: dict[str, str]) -> None:
    found = srun(slurm, ALL_REDUCE, "--nodes=4")
    assert [report["rank"] for report in found] == list(range(8))
    assert {report["size"] for report in found} == {8}
    assert [report["host"] for report in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(report["hosts"] == [0, 0, 1, 1, 2, 2, 3, 3] for report in found)
    assert {report["launcher"] for report in found} == {"slurm"}
    assert {report["coordinator"].split(":")[0] for report in found} == {"n01"}
    assert {report["total"] for report in found} == {36.0}


def test_tasks_that_share_a_nodes_gpus_take_one_each(slurm: dict[str, str]) -> None:
    found = srun(slurm, DETECT, "--nodes=2", "--gpus-per-node=2")
    assert [report["local_device_ids"] for report in found] == [[0], [1], [0], [1]]


def test_a_task_that_sees_its_own_gpu_alone_takes_number_zero(slurm: dict[str, str]) -> None:
    found = srun(slurm, DETECT, "--nodes=2", "--gpus-per-task=1")
    assert [report["local_device_ids"] for report in found] == [[0]] * 4


def test_a_batch_shell_is_one_process_and_its_steps_meet_on_different_ports(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "detect.py").write_text("import logging; logging.basicConfig()\n" + DETECT)
    run = f"{sys.executable} {tmp_path / 'detect.py'}"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{run}\necho STEP\nsrun {run}\necho STEP\nsrun {run}\necho END\n")
    log = tmp_path / "log"
    subprocess.run(
        ["sbatch", "--nodes=2", "--ntasks-per-node=2", f"--output={log}", str(script)],
        env=slurm,
        capture_output=True,
        timeout=60,
        check=True,
    )
    output = ""
    for _ in range(300):  # sbatch --wait looks every ten seconds only.
        output = log.read_text() if log.exists() else ""
        if output.endswith("END\n"):
            break
        time.sleep(0.2)
    shell, first, second = output.split("STEP\n")
    assert [(report["launcher"], report["num_processes"]) for report in reports(shell)] == [("single", 1)]
    assert "srun" in shell
    ports = []
    for step in (first, second):
        found = reports(step)
        assert [report["process_id"] for report in found] == [0, 1, 2, 3]
        ports.append({report["coordinator_address"] for report in found})
        assert len(ports[-1]) == 1
    assert ports[0] != ports[1]


def test_a_job_that_a_task_submits_and_layouts_of_tasks(slurm: dict[str, str], tmp_path: Path) -> None:
    """The variables of the task are still there in the job's shell, which is no task of that step."""
    (tmp_path / "detect.py").write_text("import logging; logging.basicConfig()\n" + DETECT)
    run, inner, log = f"{sys.executable} {tmp_path / 'detect.py'}", tmp_path / "inner.sh", tmp_path / "inner.log"
    inner.write_text(f"#!/bin/bash\nenv | grep ^SLURM_STEP\n{run}\necho END\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("n02\nn01\nn02\nn01\n")
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"srun bash -c '{run}; [ $SLURM_PROCID != 1 ] || sbatch --nodelist=n05 --output={log} {inner}'\necho PART\n"
        f"srun --distribution=cyclic {run}\necho PART\n"
        f"SLURM_HOSTFILE={hosts} srun --ntasks=4 --distribution=arbitrary {run}\necho CODE $?\necho END\n"
    )
    batch = sbatch(slurm, script, nodes=2, tasks_per_node=2, log=tmp_path / "job.log", options=("--nodelist=n[01-02]",))
    wait_for(lambda: "END" in batch.text, LIMIT, every=0.1)
    block, cyclic, arbitrary = batch.text.split("PART\n")
    assert [report["host_index"] for report in reports(block)] == [0, 0, 1, 1]
    assert [report["host_index"] for report in reports(cyclic)] == [0, 1, 0, 1]
    assert len({report["coordinator_address"] for report in reports(cyclic)}) == 1
    assert arbitrary.count("InputError: SLURM_DISTRIBUTION = 'arbitrary'") == 4
    assert "CODE 1" in arbitrary
    wait_for(lambda: log.exists() and "END" in log.read_text(), LIMIT, every=0.1)
    text = log.read_text()
    assert "SLURM_STEP_NUM_TASKS=4" in text, "this SLURM leaves nothing over: the test shows nothing"
    assert [(report["launcher"], report["num_processes"]) for report in reports(text)] == [("single", 1)]
    assert "the SLURM_* variables are left over from step" in text


def test_two_programs_of_one_step_meet_one_after_the_other(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "reduce.py").write_text(ALL_REDUCE.replace("(8, 5)", "(2, 5)"))
    run = f"{sys.executable} {tmp_path / 'reduce.py'}"
    done = subprocess.run(
        ["srun", "--nodes=1", "--ntasks=2", "--kill-on-bad-exit=1", "bash", "-c", f"{run} && {run}"],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [report["rank"] for report in reports(done.stdout)] == [0, 0, 1, 1]


def test_jobs_on_one_node_steps_of_one_job_and_a_requeued_job_have_ports_of_their_own(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "detect.py").write_text(DETECT)
    step = f"srun --overlap --ntasks=2 {sys.executable} {tmp_path / 'detect.py'}"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{step} &\n{step} &\nwait\necho END\nsleep 100\n")
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    options = ("--nodelist=n20", "--requeue", "--open-mode=append")
    batches = [sbatch(slurm, script, nodes=1, tasks_per_node=2, log=log, options=options) for log in logs]
    for batch in batches:
        batch.wait_for_text("END")
    batches[0].ask("scontrol", "requeue", batches[0].id)
    batches[0].wait_until_requeued()
    batches[0].start_again()
    wait_for(lambda: batches[0].text.count("END") == 2, LIMIT, every=0.1)
    for batch in batches:
        batch.ask("scancel", batch.id)
    coordinators: list[str] = []
    for batch in batches:
        found = reports(batch.text)
        assert {report["num_processes"] for report in found} == {2}
        coordinators += [report["coordinator_address"] for report in found]
    # Three starts of two steps, each with one port that its two tasks agree on.
    assert len(coordinators) == 12
    assert sorted(coordinators.count(each) for each in set(coordinators)) == [2] * 6
