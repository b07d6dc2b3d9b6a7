"""slurm/virtual_cluster.sh as a tool: it leaves nothing behind, and touches nothing that is not its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., subprocess.CompletedProcess[str]]


def pids(directory: Path) -> list[int]:
    return sorted(int(file.read_text()) for file in directory.glob("*.pid"))


def status(pid: int) -> str:
    """Name and state of a process; empty once it has ended (a zombie, where nobody reaps, has)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    name, _, rest = text.rpartition(")")
    return "" if rest.split()[0] == "Z" else f"{name}) {rest.split()[0]}"


@pytest.mark.usefixtures("slurm")
def test_up_is_idempotent_and_down_removes_every_trace(virtual_cluster: Script, tmp_path: Path) -> None:
    hosts = Path("/etc/hosts").read_text()
    directory = tmp_path / "cluster"
    shape = ("--nodes", "1", "--gpus-per-node", "1", "--dir", str(directory))
    try:
        first = virtual_cluster("up", *shape)
        assert first.returncode == 0, first.stderr
        assert first.stdout.splitlines()[-1] == f"export SLURM_CONF={directory}/slurm.conf"
        started = pids(directory)
        assert len(started) == 3  # munged, slurmctld, slurmd

        # A daemon that died is started again; the others are left alone.
        dead = int((directory / "n1.pid").read_text())
        os.kill(dead, 9)
        again = virtual_cluster("up", *shape)
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
        assert set(started) - {dead} < set(pids(directory))
        assert dead not in pids(directory)
        assert virtual_cluster("status", *shape).returncode == 0

        other = virtual_cluster("up", "--nodes", "2", "--dir", str(directory))
        assert other.returncode != 0
        assert "1 nodes with 1 GPUs" in other.stderr

        # A task that ignores SIGTERM, as JAX does, must not outlive the cluster.
        srun = subprocess.Popen(
            ["srun", "bash", "-c", "trap '' TERM; echo $$; while :; do sleep 1; done"],
            env={**os.environ, "SLURM_CONF": f"{directory}/slurm.conf"},
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )
        assert srun.stdout is not None
        task = int(srun.stdout.readline())
        started = pids(directory)
    finally:
        down = virtual_cluster("down", "--dir", str(directory))
    assert down.returncode == 0, down.stderr
    assert not directory.exists()
    assert Path("/etc/hosts").read_text() == hosts
    assert not [line for pid in [*started, task] if (line := status(pid))]
    srun.communicate(timeout=20)
    assert virtual_cluster("down", "--dir", str(directory)).returncode == 0


def test_a_directory_with_other_files_is_refused_and_kept(virtual_cluster: Script, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("mine")
    up = virtual_cluster("up", "--dir", str(tmp_path))
    assert up.returncode != 0
    if os.geteuid() == 0:
        assert "not empty" in up.stderr or "not installed" in up.stderr
    assert virtual_cluster("down", "--dir", str(tmp_path)).returncode == 0
    assert (tmp_path / "slurm.conf").read_text() == "mine"


def test_what_is_missing_is_named_with_its_remedy(virtual_cluster: Script, tmp_path: Path) -> None:
    """As on a machine without SLURM: a PATH with the shell's own tools alone."""
    for tool in ("bash", "sed", "id", "cat", "tr", "grep"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    up = virtual_cluster("up", "--dir", str(tmp_path / "cluster"), environ={"PATH": str(tmp_path)})
    assert up.returncode != 0
    if os.geteuid() == 0:
        assert "slurmctld slurmd munged sinfo" in up.stderr
        assert "--install" in up.stderr
    else:
        assert "root" in up.stderr


@pytest.mark.parametrize(
    "arguments",
    [("up", "--nodes", "none"), ("up", "--dir", "here"), ("up", "--nodes"), ("start",), ("up", "--node", "2")],
)
def test_a_wrong_argument_is_refused(virtual_cluster: Script, arguments: tuple[str, ...]) -> None:
    done = virtual_cluster(*arguments)
    assert done.returncode != 0
    assert "virtual_cluster.sh: " in done.stderr
