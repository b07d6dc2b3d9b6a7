"""What the pages show of a cluster is typed as it stands there, on the virtual one: with one node each, and two steps.

Jobs of many nodes are in the other tests of this folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from batch import Batch
from forks import fork_server
from jobs import Jobs
from pages import ROOT, Given, Shown, plain
from reader import write_fashion

#: Seconds for any command.
LIMIT = 400
#: What a rank of these runs imports.
IMPORTS = ("dpdist_launch.training", "dpdist.mechanism.accounting", "flax.nnx", "sklearn.datasets")
SHORT: dict[str, Any] = {"training.steps": 2, "run.plots": False, "cluster.preflight": False}
#: On a small copy of the data of `configs/fashion_mnist.yaml`.
SMALL: dict[str, Any] = {"training.epochs": None, "sampling.expected_batch_size": 32, **SHORT}


class Typist:
    """Types in a clone on the login node, where `dpdist` is on the PATH; /shared is a folder of this test."""

    def __init__(self, clone: Path, slurm: dict[str, str], dpdist: Path) -> None:
        self.clone = clone
        self.environ = slurm | {
            "PATH": f"{dpdist.parent}:{os.environ['PATH']}",
            "DPDIST": str(dpdist),
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "NPROC": "1",
            "COLUMNS": "160",
        }
        for name in ("configs", "slurm", "launch", "dpdist_launch", "dpdist"):
            (clone / name).symlink_to(ROOT / name)
        write_fashion(clone / "fashion", 300)

    def __call__(self, shown: Shown) -> str:
        """What a line prints."""
        line = self._here(shown.text).replace("runs/fashion", f"runs/fashion-{shown.page}")
        line = re.sub(r"--nodes \d+ --gpus-per-node \d", "--nodes 1 --gpus-per-node 1 --cpus-per-task 1", line)
        few = "--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --output=%j.log"  # of each option the last counts
        line = line.replace(" slurm/", f" {few} slurm/", 1).replace("srun ", "srun --ntasks=1 ")
        settings = SMALL | {"data.path": str(self.clone / "fashion")} if "fashion_mnist" in line else SHORT
        if re.match("sbatch|srun|dpdist submit", line):
            line += "".join(f" {name}={json.dumps(value)}" for name, value in settings.items())
        return self._run("bash", "-c", line)

    def python(self, *shown: Shown) -> str:
        """What blocks print, one after the other, each of which submits a run."""
        settings = SMALL | {"data.path": str(self.clone / "fashion")}
        code = "\n".join(self._here(each.text) for each in shown)
        code = re.sub(r"nodes=\d+, gpus_per_node=\d+", "nodes=1, gpus_per_node=1, cpus_per_task=1", code)
        return self._run(sys.executable, "-c", code.replace("overrides={", f"overrides={settings!r} | {{"))

    def wait(self, printed: str) -> str:
        """The log of a job of `sbatch`, which has ended well."""
        number = printed.split()[-1]
        job = Batch(number, self.clone / f"{number}.log", self.environ)
        assert job.wait() == "COMPLETED", job.text
        return job.text

    def _here(self, text: str) -> str:
        """All that is submitted is one run: whoever asks again for what has ended is told so, without another job."""
        text = re.sub("/shared/runs/(more|shell|third)", "/shared/runs/python", text)
        return text.replace("/shared", str(self.clone / "shared")).replace("platform=gpu", "platform=cpu")

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            words, cwd=self.clone, env=self.environ, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert done.returncode == 0, f"{words[-1]}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def columns(table: str, run: str) -> str:
    """The row of a run with an N for each number."""
    (row,) = [line for line in table.splitlines() if line.startswith(f"{run} ")]
    return plain(re.sub(r"n\d+(,n\d+)*$", "NODES", row), numbers=False)[0]


def test_the_pages_on_a_virtual_cluster(slurm: dict[str, str], jobs: Jobs, given: Given, tmp_path: Path) -> None:
    environ = jobs.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "NPROC": "1"}
    (servers := tmp_path / "bin").mkdir()
    (clone := tmp_path / "clone").mkdir()
    with fork_server(servers, environ, *IMPORTS) as dpdist:
        typed = Typist(clone, slurm, dpdist)
        first = typed(given.one("first-day.md", "sbatch"))
        started = [typed(each) for each in (*given.of("slurm.md", "sbatch"), *given.of("README.md", "sbatch"))]
        assert typed.wait(first).rstrip().endswith("dpdist job: done")
        for each in started:
            typed.wait(each)
        assert columns(typed(given.one("first-day.md", "dpdist status")), "first")
        assert "finished at step 2" in typed(given.one("first-day.md", "dpdist logs"))
        typed(given.one("README.md", "srun"))
        submitted = typed.python(given.one("slurm.md", r"\[python\]"), given.one("README.md", r"\[python\]"))
        assert re.match(r"TrainingJob\(\d+, (PENDING|RUNNING)", submitted), submitted
        for page in ("README.md", "slurm.md"):
            assert "finished" in typed(given.one(page, "dpdist submit"))
        (see := clone / "see-slurm-runs").mkdir()
        (see / "script").symlink_to(clone / "shared/runs/digits")
        (see / "submitted").symlink_to(clone / "shared/runs/python")
        table, detail = given.of("observing.md")
        printed = typed(table)
        for run in ("RUN", "script", "submitted"):
            assert columns(printed, run) == columns(table.output, run)
        printed = typed(detail)
        told = [line.split("  ")[1].strip() for line in detail.output.splitlines()[2:]]
        speeds = ["examples a second", "TFLOP/s a device"]  # which two steps do not have
        assert [name for name in told if name not in printed] == speeds
