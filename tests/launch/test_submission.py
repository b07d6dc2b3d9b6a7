"""What `launch.submit` does before and around sbatch, with one that is made up; tests/slurm/ has the real one."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import CONFIG, config_with
from made_up_queue import REPOSITORY, Queue

from dpdist.config import from_dict
from dpdist.errors import InputError
from dpdist.models.tasks import TASKS
from dpdist.run.directory import RunDirectory
from dpdist_launch.cli import main
from dpdist_launch.slurm.check import BUILT_IN
from dpdist_launch.slurm.job import JobFailedError, TrainingJob, attach, job_folder
from dpdist_launch.slurm.request import Request, seconds_of
from dpdist_launch.slurm.scontrol import Identity
from dpdist_launch.slurm.submit import submit


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG | {"data": {}, "model": {}}))
    return Queue(tmp_path / "queue", monkeypatch)


def submitted(to: str | Path, **settings: Any) -> TrainingJob:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return submit("base.yaml", nodes=2, overrides={"run.dir": to} | named)


# Nothing of this process changes


def test_seventy_two_submissions_from_twelve_threads_leave_the_process_as_it_was(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_ACCOUNT=ours\n")
    monkeypatch.setenv("SLURM_STEP_ID", "7")  # as within a job
    monkeypatch.setenv("MINE", "kept")
    before, streams, path = dict(os.environ), (sys.stdout, sys.stderr), list(sys.path)
    seen: list[bool] = []

    def one(number: int) -> str:
        job = submit("base.yaml", nodes=2, overrides={"run.dir": f"runs/{number}"}, site=site)
        seen.append(dict(os.environ) == before and (sys.stdout, sys.stderr) == streams)
        return job.id

    with ThreadPoolExecutor(12) as pool:
        ids = list(pool.map(one, range(72)))
    assert len(set(ids)) == 72
    assert seen == [True] * 72
    assert (dict(os.environ), (sys.stdout, sys.stderr), sys.path) == (before, streams, path)
    for job in queue.submitted():
        environ = job["environ"]
        assert (environ["SBATCH_ACCOUNT"], environ["MINE"]) == ("ours", "kept")
        assert "SLURM_STEP_ID" not in environ
    for number, job_id in enumerate(ids):
        found = attach(f"runs/{number}")
        assert found is not None
        assert found.id == job_id
        assert (found.folder / f"{job_id}_submitted.pkl").exists()


def test_options_win_over_the_variables_of_sbatch(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX", "SBATCH_WAIT"):
        monkeypatch.setenv(name, "1")
    submit("base.yaml", nodes=3, time="2:00:00", sbatch={"qos": "high", "hold": True})
    (job,) = queue.submitted()
    assert {"--nodes=3", "--time=2:00:00", "--qos=high", "--hold", "--signal=TERM@300"} <= set(job["argv"])
    assert not {"SBATCH_ARRAY_INX", "SBATCH_WAIT"} & job["environ"].keys()


# Refused before it is in the queue


MODULES = {
    "good.py": "import numpy as np\nfrom beside import helper\ndef data(): ...\nif True:\n    model = helper\n",
    "beside.py": "def helper(): ...\n",
    "needy.py": "import nothing_of_that_name.at_all\ndef data(): ...\n",
    "broken.py": "def data(:\n",
    "indirect.py": "import needy\ndef data(): ...\n",
    "dynamic.py": "for name in ('data',):\n    globals()[name] = print\n",
    "patient.py": "try:\n    import nothing_of_that_name\nexcept ImportError:\n    pass\ndef data(): ...\n",
}


@pytest.fixture
def modules(tmp_path: Path) -> None:
    for name, text in MODULES.items():
        (tmp_path / name).write_text("open('RAN', 'w')\n" + text)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"data__source": "absent:data"}, "data.source", "there is no module absent"),
        ({"data__source": "good:dat"}, "data.source", "did you mean data?"),
        ({"data__source": "digit"}, "data.source", "did you mean digits?"),
        ({"data__source": "needy:data"}, "data.source", "imports nothing_of_that_name, which is not there"),
        ({"data__source": "indirect:data"}, "data.source", "needy.py imports nothing_of_that_name"),
        ({"data__source": "broken:data"}, "data.source", "cannot be read"),
        ({"model__name": "good.model:data"}, "model.name", "there is no module good.model"),
        ({"model__loss": "good:los"}, "model.loss", "has no function los"),
        ({"data__source": "npy", "data__path": "/nowhere/x"}, "data.path", "no such file or directory"),
        ({"data__source": "idx"}, "data.path", "needs the path"),
        ({"model__name": "vit", "model__options": {"pretrained": "/nowhere"}}, "model.options.pretrained", "no such"),
        ({"cluster__platform": "gpu"}, "cluster.platform", "give --gpus-per-node"),
        ({"model__loss": lambda: 0}, "model.loss", "cannot hold a function"),
        ({"model__options": {"hidden": [{1}]}}, "model.options", "cannot hold a set"),
        ({"steps": 3}, "override", "training.steps"),
    ],
)
def test_what_is_known_to_be_wrong_is_not_queued(
    queue: Queue, tmp_path: Path, changes: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        submitted("run", **changes)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert queue.submitted() == []
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "RAN").exists(), "a module was run to find out"


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", ["good:data", "good:model", "dynamic:data", "patient:data"])
def test_what_may_be_right_is_queued(queue: Queue, tmp_path: Path, name: str) -> None:
    submitted("run", data__source=name)
    assert len(queue.submitted()) == 1
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"gpus_per_node": 2}, "cluster.platform", "leave --gpus-per-node out"),
        ({"sbatch": {"gres": "gpu:1"}}, "cluster.platform", "asks for GPUs"),
        ({"sbatch": {"array": "0-3"}}, "--sbatch array", "use --sweep"),
        ({"sbatch": {"a": "0-3"}}, "--sbatch array", "use --sweep"),
        ({"sbatch": {"N": "3"}}, "--sbatch nodes", "give --nodes instead"),
        ({"sbatch": {"output": "x"}}, "--sbatch output", "leave it out"),
        ({"time": "10"}, None, ""),
        ({"time": "9:59"}, "--time", "give at least 00:10:00"),
        ({"time": "00:05:00"}, "--time", "300 s before its limit"),
        ({"time": "soon"}, "--time", "days-hours:minutes:seconds"),
        ({"time": "UNLIMITED"}, None, ""),
    ],
)
def test_requests_of_sbatch(queue: Queue, changes: dict[str, Any], field: str | None, words: str) -> None:
    if field is None:
        submit("base.yaml", **{"nodes": 1} | changes)
        assert len(queue.submitted()) == 1
        return
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        submit("base.yaml", **{"nodes": 1} | changes)
    assert caught.value.field == field
    assert queue.submitted() == []


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("30:05", 1805),
        ("1:00:00", 3600),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-0:0:1", 86401),
        ("0", None),
    ],
)
def test_time_limits_as_sbatch_reads_them(limit: str, seconds: float | None) -> None:
    assert seconds_of(limit) == seconds


def test_a_site_that_asks_for_gpus_is_heard(queue: Queue, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_GPUS_PER_NODE=4\n")
    with pytest.raises(InputError, match="asks for GPUs"):
        submit("base.yaml", nodes=1, site=site)
    assert Request(nodes=1).asks_for_gpus({}) is False


def test_paths_that_only_the_nodes_have_can_be_left_unchecked(queue: Queue) -> None:
    overrides = {"data.source": "npy", "data.path": Path("/nowhere")}
    submit("base.yaml", nodes=1, overrides=overrides, paths_on_nodes=True)
    assert len(queue.submitted()) == 1


def test_a_directory_of_something_else_is_refused_and_left_alone(queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(InputError, match="holds files but no run"):
        submitted("thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert queue.submitted() == []


def test_the_names_that_need_no_function_are_those_that_there_are() -> None:
    from dpdist.data import datasets

    assert set(BUILT_IN["data.source"]) == set(datasets.BUILT_IN)
    text = (REPOSITORY / "dpdist/models/__init__.py").read_text()
    assert set(BUILT_IN["model.task"]) == set(TASKS)
    assert set(BUILT_IN["model.name"]) == set(re.findall(r'^        "(\w+)": \1,$', text, re.M))


@pytest.mark.parametrize("name", ["smiling \U0001f600", "caf\u00e9"])
def test_any_name_may_be_that_of_a_run(queue: Queue, tmp_path: Path, name: str) -> None:
    job = submitted(tmp_path / name)
    assert job.run_dir == tmp_path / name
    (script,) = job.folder.glob("*_submission.sh")
    assert os.fsencode(tmp_path / name) in script.read_bytes()
    assert main(["submit", "base.yaml", "--nodes", "1", "--run-dir", f"{name}-2"]) == 0
    assert attach(f"{name}-2") is not None


def test_a_name_that_is_no_utf_8_is_refused_as_checkpoints_cannot_have_it(queue: Queue) -> None:
    with pytest.raises(InputError, match="no UTF-8") as caught:
        submitted(os.fsdecode(b"latin-\xe9"))
    assert caught.value.field == "run.dir"
    assert queue.submitted() == []


# Whose job it is


@pytest.fixture
def job(queue: Queue, tmp_path: Path) -> TrainingJob:
    made = submitted("run")
    queue.knows(made, "PENDING", "Resources")
    return made


def test_the_reason_is_shown_wherever_the_state_is(
    job: TrainingJob, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repr(job) == f"TrainingJob({job.id}, PENDING (Resources), folder={str(job.folder)!r})"
    assert job.state() == "PENDING"
    with pytest.raises(InputError, match=rf"job {job.id} \(PENDING \(Resources\)\) is on this run already"):
        submitted("run")
    queue.knows(job, "COMPLETED")
    stream = io.StringIO()
    job.follow(stream)
    assert stream.getvalue() == f"job {job.id}: COMPLETED\n"


def test_a_number_that_is_another_job_now_is_neither_followed_nor_cancelled(job: TrainingJob, queue: Queue) -> None:
    found = attach("run")
    assert found is not None
    queue.knows(found, "RUNNING", name="somebody-elses")
    assert str(found.status()) == f"FORGOTTEN ({job.id} is another job now)"
    with pytest.raises(InputError, match="nothing was cancelled"):
        found.cancel()
    assert queue.cancelled() == ""
    queue.knows(found, "RUNNING")
    found.cancel()
    assert queue.cancelled() == f"{job.id}\n"


def test_another_cluster_is_not_asked_whether_the_job_has_ended(job: TrainingJob, queue: Queue) -> None:
    (queue.root / "cluster").write_text("elsewhere")
    (queue.root / "jobs").write_text("")
    assert job.state() == "UNKNOWN"
    assert "on the cluster here, and this is elsewhere" in repr(job)
    with pytest.raises(InputError, match=r"remove .*job\.json"):
        submitted("run")
    with pytest.raises(InputError, match="nothing was cancelled"):
        job.cancel()


def test_a_controller_that_is_away_keeps_nobody_waiting(job: TrainingJob, queue: Queue) -> None:
    (queue.root / "bin/scontrol").write_text("#!/bin/sh\nexec sleep 30\n")
    began = time.monotonic()
    assert "UNKNOWN (no answer in 2 s)" in repr(job)
    assert time.monotonic() - began < 10
    (queue.root / "bin/scontrol").write_text("#!/nowhere/sh\n")
    assert "UNKNOWN" in repr(job)


def test_waiting_ends_when_told_to(job: TrainingJob) -> None:
    for call in (job.wait, job.result):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"job {job.id} is PENDING \(Resources\) after 0.3 s, and goes on"):
            call(timeout=0.3)
        assert time.monotonic() - began < 10


def test_ctrl_c_while_following_is_told_to_the_shell(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: TrainingJob) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingJob, "follow", interrupt)
    assert main(["submit", "base.yaml", "--nodes", "1", "--follow", "--run-dir", "run"]) == 130
    assert "the same command follows it again" in capsys.readouterr().err


def test_a_finished_run_that_was_to_go_on_is_not_the_result(queue: Queue, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    short, longer = (from_dict(config_with(run.root, training={"steps": steps}, data={}, model={})) for steps in (2, 9))
    run.open_private()
    run.begin(short)
    run.write_summary({"status": "finished", "step": 2, "accuracy": float("nan")})
    (queue.root / "jobs").write_text("")
    # Cancelled and forgotten: found by the handle, by a later Python, and by the number alone.
    job = TrainingJob("7", run.root, longer, identity=Identity(cluster="here", name="run", folder="x"))
    job.record()
    later = attach(run.root)
    assert later is not None
    for each in (job, later):
        with pytest.raises(JobFailedError, match="job 7 is FORGOTTEN"):
            each.result(poll_seconds=0.1)
    run.begin(longer)
    run.write_summary({"status": "finished", "step": 9})
    assert later.result()["step"] == 9


def test_a_run_that_has_ended_as_asked_is_not_queued(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(run_dir := queue.root / "run")
    assert job.config is not None
    RunDirectory(run_dir).begin(job.config)
    RunDirectory(run_dir).write_summary(summary := {"status": "finished", "step": 7, "steps": 7})
    told = {"job": None, "state": "finished", "reason": None, "run_dir": str(run_dir), "log": None}
    line = ["submit", "base.yaml", "--nodes", "1", "--run-dir", str(run_dir)]
    assert main([*line, "--follow"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(text) for text in out.splitlines()] == [told, summary]
    assert err == f"{run_dir} is finished at step 7 of 7: nothing is queued\n"
    assert len(queue.submitted()) == 1
    assert main([*line, "training.steps=99"]) == 0
    assert len(queue.submitted()) == 2


def test_a_run_that_dies_while_it_begins_again_leaves_no_summary_of_the_former_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.begin(from_dict(config_with(tmp_path)))
    run.write_summary({"status": "finished"})
    longer = from_dict(config_with(tmp_path, training={"steps": 99}))
    write: Callable[..., None] = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr("dpdist.run.directory.write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        run.begin(longer)
    assert run.ended(longer) is None
    assert not run.summary.exists()


# The run directory that the batch script asks for


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "from/yaml"),
        (["--default", "d"], "from/yaml"),
        (["run.dir=set"], "set"),
        (["--run-dir", "x y"], "x y"),
        (["run.dir=set", "--run-dir=x", "--processes", "2"], "x"),
        (["run.dir='a: b'"], "a: b"),
        (["run.dir=~/r"], "HOME/r"),
    ],
)
def test_the_run_directory_of_arguments(
    arguments: list[str], printed: str, queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "named.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"run": {"dir": "from/yaml"}}))
    assert main(["run-dir", str(config), *arguments]) == 0
    assert capsys.readouterr().out == printed.replace("HOME", str(Path.home())) + "\n"


def test_the_default_directory_and_the_names_of_options(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-dir", "base.yaml", "--default", "runs/12"]) == 0
    assert main(["run-dir", "base.yaml"]) == 0
    assert capsys.readouterr().out == "runs/12\nruns/base\n"
    for command in ("train", "run-dir", "submit"):
        with pytest.raises(SystemExit):
            main([command, "base.yaml", "--nodes", "1", "--run", "elsewhere"])
    assert job_folder(Path("elsewhere")).exists() is False
