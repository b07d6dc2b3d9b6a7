"""The ranks of a job run dpdist whatever lies beside the user, and a run has ended where its summary says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import LIMIT, Jobs, Run, config_with

import dpdist
from dpdist.config import Config, from_dict
from dpdist.run.directory import RunDirectory
from dpdist_launch import local
from dpdist_launch.cli import main
from dpdist_launch.local import run_local, train_local
from dpdist_launch.ranks import outdated_summary, rank_environment
from dpdist_launch.slurm.job import JobFailedError, TrainingJob, attach
from dpdist_launch.slurm.scontrol import Identity

SOURCE = Path(dpdist.__file__).parents[1]
#: What the ranks run where it is not dpdist: the program is an argument.
PYTHON = (sys.executable, "-c")
#: A rank 0 that writes its second argument as the summary its first one names; all return the third.
WRITES_SUMMARY = """
import os, sys
if os.environ["DPDIST_PROCESS_ID"] == "0":
    open(sys.argv[1], "w").write(sys.argv[2])
sys.exit(int(sys.argv[3]))
"""


def decoy(path: Path) -> None:
    """A file that, run or imported in place of ours, leaves RAN beside it and exits as if all were well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nopen({str(path.parent / 'RAN')!r}, 'w')\nos._exit(0)\n")


# Files with the names of modules


@pytest.mark.parametrize("name", ["launch.py", "dpdist_launch.py", "dpdist/__init__.py", "types.py", "json.py"])
def test_a_file_in_the_working_directory_never_stands_in_for_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    decoy(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run_local(["--help"], 1, None) == 0
    assert "train" in capfd.readouterr().out
    assert list(tmp_path.rglob("RAN")) == []


def test_another_package_named_launch_on_the_path_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ROS 2 has one, and its set-up puts it on PYTHONPATH."""
    for name in ("__init__.py", "__main__.py"):
        decoy(tmp_path / "ros" / "launch" / name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "ros"), str(SOURCE)]))
    monkeypatch.chdir(tmp_path)
    assert run_local(["--help"], 1, None) == 0
    assert "train" in capfd.readouterr().out
    assert list(tmp_path.rglob("RAN")) == []


def test_what_a_rank_starts_ignores_the_working_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbour.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import neighbour'])"
    assert run_local([program], 1, None, program=PYTHON) == 0
    assert "No module named 'neighbour'" in capfd.readouterr().err


def test_a_run_trains_beside_files_with_the_names_of_modules_and_finds_the_users_own(
    jobs: Jobs, tmp_path: Path
) -> None:
    for name in ("launch.py", "dpdist_launch/__init__.py", "dpdist/__init__.py", "types.py", "json.py", "jax.py"):
        decoy(tmp_path / name)
    decoy(tmp_path / "ros" / "launch" / "__init__.py")
    for file in (jobs.config, jobs.root / "userland.py"):
        shutil.copy(file, tmp_path)
    command = Path(sys.executable).with_name("dpdist")
    done = subprocess.run(
        [command, "train", "base.yaml", "training.steps=2", "--run-dir", "run", "--processes", "2"],
        cwd=tmp_path,
        env=jobs.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "ros"), str(SOURCE)])},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = Run(tmp_path / "run").summary
    assert (summary["status"], summary["step"], summary["processes"]) == ("finished", 2, 2)
    assert list(tmp_path.rglob("RAN")) == []


def test_the_ranks_of_a_clone_that_is_not_installed_find_it() -> None:
    """The launcher has it as its working directory alone, which its ranks do not look into."""
    program = (
        "import os, sys\nfrom dpdist_launch.ranks import PYTHON, rank_environment\n"
        "os.execve(PYTHON[0], [*PYTHON, '-S', '-c', 'import dpdist_launch; print(dpdist_launch.__file__)'],"
        " rank_environment({}))"
    )
    libraries = next(entry for entry in sys.path if entry.endswith("site-packages"))
    environ = {"PYTHONPATH": libraries}  # read by no .pth file, so that an editable install is not seen
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=SOURCE, env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(SOURCE / "dpdist_launch" / "__init__.py"), done.stderr


def test_an_installed_package_leaves_the_path_of_its_ranks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone put in front of all would shadow the user's `tests` or `docs`."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).absolute() != SOURCE])
    assert rank_environment({"A": "1"}) == {"A": "1", "PYTHONSAFEPATH": "1"}
    monkeypatch.syspath_prepend(str(SOURCE))
    assert rank_environment({"PYTHONPATH": str(SOURCE)})["PYTHONPATH"] == str(SOURCE)


# Ranks that return 0


def training(run_dir: Path, steps: int = 16) -> Config:
    return from_dict(config_with(run_dir, training={"steps": steps}))


def train_as(config: Config, program: str, *arguments: str) -> int:
    return train_local(config, [program, *arguments], 2, program=PYTHON)


def test_ranks_that_return_0_and_have_trained_nothing_have_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_as(training(tmp_path / "run"), "print('done')") == 1
    err = capfd.readouterr().err
    assert "all 2 ranks returned 0" in err
    assert f"{tmp_path}/run/summary.json" in err


@pytest.mark.parametrize(
    ("status", "code", "returned"),
    [
        ("finished", 0, 0),
        ("budget_exhausted", 0, 0),
        ("preempted", 75, 75),
        ("preempted", 0, 1),
        ("failed", 0, 1),
        ("finished", 3, 3),
    ],
)
def test_a_summary_must_say_that_the_run_has_ended(tmp_path: Path, status: str, code: int, returned: int) -> None:
    summary = str(tmp_path / "summary.json")
    assert train_as(training(tmp_path), WRITES_SUMMARY, summary, json.dumps({"status": status}), str(code)) == returned


def test_a_summary_from_before_is_no_proof_unless_the_run_had_ended_as_asked(tmp_path: Path) -> None:
    run, config, longer = RunDirectory(tmp_path), training(tmp_path), training(tmp_path, steps=20)
    run.begin(config)
    run.write_summary({"status": "finished", "incarnation": 0})
    assert train_as(config, "pass") == 0  # nothing was left to do
    assert train_as(longer, "pass") == 1
    assert train_as(longer, WRITES_SUMMARY, str(run.summary), '{"status": "finished", "incarnation": 1}', "0") == 0
    run.write_summary({"status": "preempted"})
    assert train_as(config, "pass") == 1


def test_a_summary_that_cannot_be_read_is_left_to_the_ranks(tmp_path: Path) -> None:
    """They say what is wrong with it, in one line; here it would be said in the launcher's traceback."""
    (tmp_path / "summary.json").touch()
    assert outdated_summary(training(tmp_path)) is None


def test_the_command_judges_by_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "digits.yaml"
    config.write_text("{training: {steps: 1}, privacy: {enabled: false}}")
    passed: dict[str, Any] = {}
    monkeypatch.setattr(local, "run_local", lambda *_, **options: passed.update(options) or 0)
    assert main(["train", str(config), "--run-dir", str(tmp_path / "run"), "--processes", "2"]) == 1
    assert passed["program"] == (sys.executable, "-P", "-m", "dpdist_launch")
    assert "-m dpdist_launch seems to run something other than dpdist" in capsys.readouterr().err


def test_a_job_is_judged_by_a_summary_of_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later Python finds it: `attach` knows the config that was submitted."""
    monkeypatch.setattr(TrainingJob, "wait", lambda *_, **__: "COMPLETED")
    run, asked = RunDirectory(tmp_path), training(tmp_path, steps=20)
    run.begin(training(tmp_path))
    run.write_summary({"status": "finished", "incarnation": 0})
    TrainingJob("7", tmp_path, asked, identity=Identity(cluster="c", name="n", folder="f")).record()
    job = attach(tmp_path)
    assert job is not None
    with pytest.raises(JobFailedError, match="job 7 is COMPLETED"):
        job.result()
    run.begin(asked)
    run.write_summary({"status": "finished", "incarnation": 1})
    assert job.result()["incarnation"] == 1
    assert TrainingJob("8", tmp_path).result()["incarnation"] == 1  # nothing is known of what was asked for
