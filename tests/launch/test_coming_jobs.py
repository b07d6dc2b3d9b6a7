"""`dpdist status` of jobs that sbatch has sent and that have no directory yet, as squeue tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import fake_command, first_on_path, write_run

from dpdist_launch.cli import main


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes squeue say these jobs, of our own; fields are separated by `;` here."""
    told = tmp_path / "told"
    fake_command(tmp_path / "bin", "squeue", f'case "$*" in *--me*) cat {told} ;; esac')
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    return lambda *lines: told.write_bytes(
        "".join(f"{line}\n".replace(";", "\x1f") for line in lines).encode("latin-1")
    )


def test_jobs_of_our_scripts_that_have_no_directory_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], queued: Callable[..., None]
) -> None:
    write_run(tmp_path / "runs/a", step=40, told=[{"event": "preempted", "step": 40, "saved": True}], job="17")
    script = "/r/slurm/train_80gpu.sh"
    queued(
        f"17+0;PENDING;Priority;N/A;dpdist;/w;{script} c.yaml",  # it has a directory
        f"18;PENDING;Dependency;N/A;dpdist;{tmp_path};{script} c.yaml --run-dir runs/a",  # so has this one's run
        f"21;PENDING;None;2026-11-27T14:30:00;a|b;/w;{script} c.yaml --run-dir=runs/x --run-dir runs/y a=b|c",
        "9;PENDING;(Resources);N/A;dpdist-caf\xe9;/w;/r/mine.sh it's",
        f"23;RUNNING;None;2026-11-27T14:30:00;x;{tmp_path};{script} --run-dir soon",
        "24;PENDING;None;N/A;dpdist-wrap;/w;(null)",
        "22;PENDING;Priority;N/A;other;/w;/r/other.sh",
        "half a line",
    )
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "no directory yet (a job that sbatch sent makes it as it begins):",
        "    job 9 waits: Resources",
        "        mine.sh it's",
        "    job 21; expected to start 2026-11-27 14:30:00",
        "        train_80gpu.sh c.yaml --run-dir=runs/x --run-dir runs/y a=b|c",
        "    job 23: RUNNING",
        "        train_80gpu.sh --run-dir soon",
        "    job 24",
        "        dpdist-wrap",
    ]
    assert main(["status", "/w/runs", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)["coming"]
    assert (job["number"], job["run_dir"]) == ("21", "/w/runs/y")
    assert main(["status", "soon"]) == 0
    assert "job 23: RUNNING" in capsys.readouterr().out
    (tmp_path / "loop").symlink_to("loop")
    queued(*(f"{number};PENDING;None;N/A;dpdist;/w;{script} --run-dir {tmp_path}/loop/x" for number in range(100, 113)))
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "    and 3 more; `squeue --me` has all"


def test_of_jobs_that_slurm_does_not_tell_nothing_is_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs/a", step=40)
    fake_command(tmp_path / "bin", "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    assert main(["status", str(tmp_path / "runs/b")]) == 2
    assert "of jobs nothing is known (Unable to contact slurm controller)" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "runs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slurm"] == "Unable to contact slurm controller"
