"""A run directory in a home directory, under a name that is too long, with a torn summary, or without plots."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from jobs import Jobs, Run, wait_all

from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory


def test_a_tilde_is_the_home_directory_whichever_way_a_path_is_given(jobs: Jobs, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    wait_all([jobs.train(Run(Path("~/runs/x")), "training.steps=1", "privacy.insecure_seed=null", **home)])
    run = Run(tmp_path / "runs/x")
    assert run.summary["status"] == "finished"
    assert (run.root / "private/secret.key").exists()
    again = jobs.command("train", str(jobs.config), "training.steps=1", "run.dir=~/runs/x", **home).wait()
    assert "nothing to do" not in again.err  # another config: the seed is back
    assert "privacy.insecure_seed" in again.err
    export = jobs.command("export", "~/runs/x", "--to=~/given", **home).wait()
    assert export.code == 0, export.err
    assert json.loads(export.out)["to"] == str(tmp_path / "given")
    assert (tmp_path / "given/params.safetensors").exists()
    assert not (jobs.root / "~").exists()


def test_a_tilde_is_the_home_directory_from_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpdist.release.export import export
    from dpdist.release.trained_run import load

    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"run_dir = '{tmp_path}/none': holds no run"):
        load("~/none")
    with pytest.raises(InputError, match=rf"run_dir = '{tmp_path}/none': holds no run"):
        export("~/none", "~/to")
    (tmp_path / "to").touch()
    with pytest.raises(InputError, match=rf"--to = '{tmp_path}/to': is there already"):
        export("~/none", "~/to")


@pytest.mark.parametrize("arguments", [[], ["--processes", "2"]])
def test_a_name_that_no_file_system_takes_is_refused_at_once(jobs: Jobs, arguments: list[str]) -> None:
    began = time.monotonic()
    ended = jobs.command("train", str(jobs.config), "--run-dir", "runs/" + 256 * "x", *arguments).wait()
    assert ended.code == 2
    assert ended.err.startswith("dpdist: error: run.dir = 'runs/xxx")
    assert "at most 255 bytes" in ended.err
    assert ended.err.count("\n") == 1
    assert time.monotonic() - began < 60  # no process was started, to wait for another


def test_a_path_that_is_too_long_as_a_whole_is_refused(jobs: Jobs) -> None:
    ended = jobs.command("train", str(jobs.config), "--run-dir", "runs/" + 3000 * "x/").wait()
    assert ended.code == 2
    assert "cannot be written (File name too long); name another directory." in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("torn", ["", '{"status": "fini', "[]", "{}", "\xff"])
def test_a_torn_summary_counts_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: str) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_summary() is None
    assert capsys.readouterr().err == ""  # it has not ended: that is no fault
    run.summary.write_text(torn, encoding="latin-1")
    assert run.read_summary() is None
    assert capsys.readouterr().err == f"dpdist: {run.summary} is not whole: going on as if there were none\n"


def test_a_run_with_a_torn_summary_goes_on_and_may_want_plots_after_all(jobs: Jobs) -> None:
    run = jobs.new("torn")
    wait_all([jobs.train(run, "training.steps=2", "run.plots=false")])
    assert not (run.root / "plots").exists()
    whole = run.summary
    (run.root / "summary.json").write_text("")
    wait_all([jobs.train(run, "training.steps=2", "run.plots=true")])
    assert (run.summary["params_sha256"], run.summary["step"]) == (whole["params_sha256"], 2)
    assert list((run.root / "plots").iterdir())
    assert run.plan["incarnation"] == 0  # there is one: to want plots is no other run


def test_a_run_with_closed_streams_trains_all_the_same(jobs: Jobs) -> None:
    run = jobs.new("silent")
    command = [
        sys.executable,
        "-m",
        "launch",
        "train",
        str(jobs.config),
        "training.steps=2",
        "--run-dir",
        str(run.root),
    ]
    ended = jobs.program(["bash", "-c", f"exec {shlex.join(command)} <&- >&- 2>&-"]).wait()
    assert ended.code == 0, run.logs
    assert run.summary["status"] == "finished"
    assert len(run.charged) == 2
