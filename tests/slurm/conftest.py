"""A real SLURM of twenty virtual nodes with four GPUs each, for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from jobs import Jobs

#: Nothing of what the tests set may reach a job by accident, and each of its processes is one of many on this machine.
EXTRA = {"NPROC": "1"}
VIRTUAL_CLUSTER = Path(__file__).parents[2] / "slurm" / "virtual_cluster.sh"


class Script(Protocol):
    """Calls slurm/virtual_cluster.sh with the arguments."""

    def __call__(self, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def virtual_cluster() -> Script:
    def call(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(VIRTUAL_CLUSTER), *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def slurm(virtual_cluster: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch reach the cluster.

    Skips where there can be none, and says why; with DPDIST_REQUIRE_SLURM=1 it fails instead.
    """
    directory = tmp_path_factory.mktemp("slurm")
    up = virtual_cluster("up", "--nodes", "20", "--gpus-per-node", "4", "--dir", str(directory), "--install")
    if up.returncode != 0:
        virtual_cluster("down", "--dir", str(directory))
        reason = f"no virtual SLURM cluster: {up.stderr.strip()}"
        if os.environ.get("DPDIST_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    name, _, value = up.stdout.splitlines()[-1].removeprefix("export ").partition("=")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "DPDIST_", "CUDA_VISIBLE"))}
    yield {**outside, name: value}
    down = virtual_cluster("down", "--dir", str(directory))
    assert down.returncode == 0, down.stderr


@pytest.fixture
def cluster(slurm: dict[str, str], jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """This process as a user's Python on the login node, next to the user's module."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in (slurm | {"PYTHONPATH": jobs.environ["PYTHONPATH"]} | EXTRA).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(jobs.root)
    return jobs
