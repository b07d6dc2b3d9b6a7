"""What a user gets wrong with `sbatch slurm/train_80gpu.sh`: one line with the remedy, at once."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from batch import SCRIPT, Batch, sbatch
from jobs import Jobs

#: Seconds for a job that only has to find out that it cannot run.
SOON = 120.0


def last_line(batch: Batch) -> str:
    return batch.text.splitlines()[-1]


def failing(
    slurm: dict[str, str], jobs: Jobs, *arguments: str, tasks: int = 1, options: tuple[str, ...] = (), **environ: str
) -> str:
    """The last line of the log of a job that must fail."""
    log = jobs.new("refused").root.with_suffix(".log")
    batch = sbatch(
        slurm,
        SCRIPT,
        *arguments,
        nodes=1,
        tasks_per_node=tasks,
        log=log,
        options=("--cpus-per-task=1", *options),
        cwd=jobs.root,
        NPROC="1",
        **environ,
    )
    assert batch.wait(SOON) == "FAILED", batch.text
    return last_line(batch)


def test_an_unknown_config(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, "configs/nowhere.yaml")
    assert "failed (exit code 2): dpdist: error: CONFIG = 'configs/nowhere.yaml': no such file" in line


def test_a_run_directory_that_cannot_be_written(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, str(jobs.config), "--run-dir", "/proc/nowhere")
    assert "dpdist: error: run.dir = '/proc/nowhere': cannot be written" in line
    assert "name another directory" in line


def test_a_site_file_that_is_not_there(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, str(jobs.config), DPDIST_SITE="/nowhere/site.sh")
    assert line.startswith("dpdist job: DPDIST_SITE = /nowhere/site.sh: no such file; copy slurm/site.example.sh")


def test_no_command_and_no_site_file(slurm: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    """A fresh clone, submitted from before anything is installed."""
    (tmp_path / "slurm").mkdir()
    for name in ("train_80gpu.sh", "job.sh"):
        (tmp_path / "slurm" / name).write_text((SCRIPT.parent / name).read_text())
    line = failing({k: v for k, v in slurm.items() if k != "DPDIST"}, jobs, DPDIST_HOME=str(tmp_path), DPDIST="")
    assert "no command" in line
    assert "slurm/site.sh (copy slurm/site.example.sh)" in line


def test_a_container_that_is_not_there(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, str(jobs.config), DPDIST_CONTAINER="/nowhere/dpdist.sif")
    assert line.startswith("dpdist job: DPDIST_CONTAINER = /nowhere/dpdist.sif: no such file; build it")


def test_a_command_runs_in_the_container_of_the_site(slurm: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    """The engine is played by a script that shows what it is asked to run."""
    engine, image = tmp_path / "engine", tmp_path / "dpdist.sif"
    engine.write_text('#!/bin/bash\n[[ "$*" != *" run-dir "* ]] || exec echo d\necho "ENGINE $*" >&2\nexit 3\n')
    engine.chmod(0o755)
    image.touch()
    site = tmp_path / "site.sh"
    site.write_text(
        f'DPDIST_CONTAINER={image}\nDPDIST_CONTAINER_EXEC="{engine} exec --nv --bind /scratch"\nunset DPDIST\n'
    )
    log = jobs.new("container").root.with_suffix(".log")
    batch = sbatch(slurm, SCRIPT, "a.yaml", "--run-dir", "d", nodes=1, tasks_per_node=1, log=log, DPDIST_SITE=str(site))
    assert batch.wait(SOON) == "FAILED"
    assert f"ENGINE exec --nv --bind /scratch {image} dpdist train a.yaml --run-dir d" in batch.text


def test_a_command_that_is_not_dpdist_and_returns_0(slurm: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    run_dir, only_says = tmp_path / "run", tmp_path / "dpdist"
    line = failing(slurm, jobs, str(jobs.config), DPDIST="/bin/true")
    assert line.startswith("dpdist job: /bin/true does not say which run directory is meant")
    only_says.write_text(f'#!/bin/bash\n[ "$1" != run-dir ] || exec {sys.executable} -m launch "$@"\n')
    only_says.chmod(0o755)
    # The directory stands in the config.
    config = jobs.root / "named.yaml"
    config.write_text(f"{jobs.config.read_text()}\n".replace("run:", f"run:\n  dir: {run_dir}"))
    line = failing(slurm, jobs, str(config), DPDIST=str(only_says), PYTHONPATH=jobs.environ["PYTHONPATH"])
    assert f"failed: all processes returned 0, but {run_dir}/summary.json does not say" in line


def test_more_tasks_than_gpus(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, str(jobs.config), "cluster.platform=auto", tasks=3, options=("--gpus-per-node=2",))
    assert "CUDA_VISIBLE_DEVICES = '0,1': 3 processes run on this node" in line
    assert "--gpus-per-node=3" in line


def test_a_coordinator_that_no_node_can_find(slurm: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    command = shlex.join([sys.executable, "-m", "launch"])
    lost.write_text(f'#!/bin/bash\nSLURM_STEP_NODELIST=nowhere[1-2] exec {command} "$@"\n')
    lost.chmod(0o755)
    line = failing(slurm, jobs, str(jobs.config), tasks=2, DPDIST=str(lost), PYTHONPATH=jobs.environ["PYTHONPATH"])
    assert "cannot find nowhere1, rank 0's host" in line
    assert "/etc/hosts" in line


def test_without_arguments_the_default_config_says_what_it_lacks(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs)
    assert "dpdist: error: " in line
    assert "cluster.platform" in line or "data.path = 'data/cifar-100-python.tar.gz': no such file" in line


def test_a_time_limit_that_the_notice_fills(slurm: dict[str, str], jobs: Jobs) -> None:
    line = failing(slurm, jobs, str(jobs.config), options=("--time=5",))
    assert line.startswith("dpdist job: --time = 5:00: SLURM tells the job to leave 300 s before its limit")


def test_a_rank_that_never_comes_is_named_with_its_node(slurm: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    late = tmp_path / "late"
    command = shlex.join([sys.executable, "-m", "dpdist_launch"])
    late.write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" != 1 ] || sleep 600\nexec {command} "$@"\n')
    late.chmod(0o755)
    line = failing(
        slurm,
        jobs,
        str(jobs.config),
        "cluster.initialization_timeout=3",
        tasks=2,
        DPDIST=str(late),
        DPDIST_MAX_RESTARTS="0",
        PYTHONPATH=jobs.environ["PYTHONPATH"],
    )
    assert re.search(r"failed \(exit code \d+\): rank \[1\] \(n\d+\) did not come within 3 s", line), line
