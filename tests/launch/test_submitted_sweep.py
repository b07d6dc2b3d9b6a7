"""A sweep as one array of jobs: what is submitted, what is resumed, and what choosing the best of it costs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import CONFIG
from made_up_queue import Queue

from dpdist.errors import InputError
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import ADAPTIVE
from dpdist.mechanism.ledger import Ledger, Plan, PrivacyTerms
from dpdist.run.directory import RunDirectory
from dpdist_launch.cli import main
from dpdist_launch.slurm.command import axes
from dpdist_launch.slurm.job import attach

RATES = "optimizer.learning_rate=0.1,0.3,1"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.chdir(tmp_path)
    private = {"noise_multiplier": 4.0, "delta": 1e-4}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG | {"data": {}, "model": {}, "privacy": private}))
    made = Queue(tmp_path / "queue", monkeypatch)
    (made.root / "jobs").write_text("")
    return made


def sweep(*options: str) -> int:
    return main(["submit", "base.yaml", "--nodes", "1", "--run-dir", "s", *options])


def begin(point: Path, *, steps: int = 16, sigma: float = 4.0) -> None:
    """What a run leaves that has its plan, with the settings it was asked for with, and has taken no step."""
    asked = json.loads((point.parent / "sweep.json").read_text())["asked"]
    digests = {told["name"]: told["digest"] for points in asked for told in points}
    terms = PrivacyTerms(
        clip_norm=1.0,
        noise_multiplier=sigma,
        delta=1e-4,
        epsilon=1.0,
        epsilon_rdp=1.0,
        accountant="pld",
        renyi_order=32,
    )
    plan = Plan(
        incarnation=0,
        nonce="00" * 16,
        environment="",
        adjacency="",
        dataset_size=1000,
        sampling_probability=0.064,
        expected_batch_size=64.0,
        steps=steps,
        steps_asked=steps,
        privacy=terms,
        settings=digests[point.name],
    )
    Ledger(RunDirectory(point).ledger).begin(plan)


def begin_all(root: Path) -> None:
    """All points of `RATES` have their plans."""
    for rate in ("0.1", "0.3", "1"):
        begin(root / "s" / f"learning_rate={rate}")


def finish(point: Path) -> None:
    """The end of that run."""
    run, job = RunDirectory(point), attach(point)
    assert job is not None
    assert job.config is not None
    run.begin(job.config)
    run.write_summary({"status": "finished", "step": 16, "epsilon": 1.25, "accuracy": 0.75})


def test_one_bounded_array_of_runs_that_have_everything_of_their_own(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--sweep", RATES, "--sweep", "privacy.clip_norm=1,2", "--at-most", "3") == 0
    (job,) = queue.submitted()
    assert "--array=0-5%3" in job["argv"]
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    names = [point["point"] for point in found["points"]]
    assert names[:2] == ["learning_rate=0.1,clip_norm=1", "learning_rate=0.1,clip_norm=2"]
    assert len(set(names)) == 6
    for number, point in enumerate(found["points"]):
        assert point["run_dir"] == str(tmp_path / "s" / point["point"])
        assert point["job"] == f"{found['job']}_{number}"
        assert point["log"] == str(tmp_path / f"s/private/slurm/{point['job']}_0_log.err")
        assert (tmp_path / f"s/private/slurm/{point['job']}_submitted.pkl").exists()
    (script,) = (tmp_path / "s/private/slurm").glob("*_submission.sh")
    (runs,) = re.findall(r"^dpdist_runs=\((.*)\)$", script.read_text(), re.M)
    assert runs.split() == [point["run_dir"] for point in found["points"]]
    assert "no composed epsilon: no point has begun" in printed.err


def test_the_same_line_again_submits_what_has_not_ended(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--sweep", RATES) == 0
    first, second, third = (tmp_path / "s" / f"learning_rate={rate}" for rate in ("0.1", "0.3", "1"))
    finish(first)
    running = attach(second)
    assert running is not None
    queue.knows(running, "RUNNING")
    capsys.readouterr()
    assert sweep("--sweep", RATES) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [job["argv"][0] for job in queue.submitted() if "--array=0-0%1" in job["argv"]] != []
    resumed = attach(third)
    assert resumed is not None
    assert resumed.id == f"{found['job']}_0"
    assert [point["state"] for point in found["points"]][:2] == ["finished", "RUNNING"]
    assert re.search(r"^learning_rate=0.1 +finished +16 +1.25 +0.75$", printed.err, re.M)
    for point in (second, third):
        finish(point)
    assert sweep("--sweep", RATES, "--follow") == 0
    assert json.loads(capsys.readouterr().out)["job"] is None
    assert len(queue.submitted()) == 2


def composed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    printed = capsys.readouterr()
    return json.loads(printed.out)["composed"], printed.err


def test_choosing_the_best_costs_what_all_of_them_cost(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("--sweep", RATES)
    begin_all(tmp_path)
    capsys.readouterr()
    sweep("--sweep", RATES)
    cost, text = composed(capsys)
    whole = epsilon(sampling_probability=0.064, noise_multiplier=4.0, steps=48, delta=1e-4)
    assert cost == {"epsilon": whole.epsilon, "delta": 1e-4, "accountant": "pld", "points": 3}
    assert f"choosing the best of the sweep costs the composed epsilon, {whole.epsilon:.4g}" in text
    # A point that is added on seeing results needs a bound that allows for it; and one more of another kind.
    sweep("--sweep", "optimizer.learning_rate=3")
    begin(tmp_path / "s/learning_rate=3")
    capsys.readouterr()
    sweep("--sweep", "optimizer.learning_rate=3")
    later, text = composed(capsys)
    assert (later["accountant"], later["points"]) == (ADAPTIVE, 4)
    assert later["epsilon"] > whole.epsilon
    assert "some of which were added later" in text


def test_points_that_were_asked_for_before_any_had_begun_count_as_one_request(queue: Queue, tmp_path: Path) -> None:
    for rates in ("0.1,0.3", "1"):
        sweep("--sweep", f"optimizer.learning_rate={rates}")
    assert [len(points) for points in json.loads((tmp_path / "s/sweep.json").read_text())["asked"]] == [3]


def test_as_long_as_some_points_have_not_begun_the_bound_allows_for_any_number_of_them(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever likes the second point may cancel the third: how many there are is chosen on what was seen."""
    sweep("--sweep", RATES)
    begin(tmp_path / "s/learning_rate=0.3")
    capsys.readouterr()
    sweep("--sweep", RATES)
    cost, text = composed(capsys)
    assert cost is None
    assert "before learning_rate=0.1 has begun" in text
    begin(tmp_path / "s/learning_rate=0.1")
    sweep("--sweep", RATES)
    cost, _ = composed(capsys)
    assert (cost["accountant"], cost["points"]) == (ADAPTIVE, 2)


def test_a_point_that_was_deleted_is_not_forgotten(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("--sweep", RATES)
    points = [tmp_path / "s" / f"learning_rate={rate}" for rate in ("0.1", "0.3", "1")]
    for point in points:
        begin(point)
    shutil.rmtree(points[0])
    capsys.readouterr()
    sweep("--sweep", "optimizer.learning_rate=0.3,3")
    cost, text = composed(capsys)
    assert cost is None
    assert "what learning_rate=0.1 has cost is gone" in text
    assert len(json.loads((tmp_path / "s/sweep.json").read_text())["asked"]) == 2


def test_a_point_whose_guarantee_is_void_voids_that_of_the_sweep(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("--sweep", RATES)
    begin_all(tmp_path)
    summary = {"status": "finished", "step": 16, "epsilon": 1.0, "accuracy": 0.1, "guarantee": "void: not finite"}
    finish(tmp_path / "s/learning_rate=1")
    RunDirectory(tmp_path / "s/learning_rate=1").write_summary(summary)
    capsys.readouterr()
    sweep("--sweep", RATES)
    cost, text = composed(capsys)
    assert cost is None
    assert "no guarantee holds for learning_rate=1" in text


@pytest.mark.parametrize("changed", ["training.steps=5000", "data.split_seed=7", "privacy.delta=1e-5"])
def test_the_same_points_with_other_settings_are_refused(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    sweep("--sweep", RATES)
    begin(tmp_path / "s/learning_rate=0.1")
    capsys.readouterr()
    assert sweep("--sweep", RATES, changed) == 2
    assert "Name a new run.dir" in capsys.readouterr().err
    if not changed.startswith("training"):
        assert sweep("--sweep", "optimizer.learning_rate=7", changed) == 2
        assert "name a new run.dir" in capsys.readouterr().err
    assert len(queue.submitted()) == 1


def test_a_sweep_with_a_point_without_privacy_has_no_epsilon(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("--sweep", "privacy.enabled=true,false")
    cost, text = composed(capsys)
    assert cost is None
    assert "no guarantee holds for enabled=false" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sweep", "optimizer.learning_rate=0.1,-1"), "optimizer.learning_rate = -1"),
        (("--sweep", "optimizer.lr=0.1"), "did you mean optimizer.learning_rate"),
        (("--sweep", "model.loss=cross_entropy,absent:loss"), "there is no module absent"),
        (("--sweep", "optimizer.learning_rate"), "write key=a,b,c"),
        (("--sweep", "optimizer.learning_rate=[1"), "write key=a,b,c"),
        (("--sweep", "optimizer.learning_rate="), "give at least one value"),
        (("--sweep", "optimizer.learning_rate=1,1"), "is given twice"),
        (("--sweep", RATES, "--sweep", RATES), "is swept already"),
        (("--sweep", "run.dir=a,b"), "sweep over others"),
        (("--sweep", "data.split_seed=0,1"), "records that another trains on"),
        (("--sweep", "privacy.delta=1e-4,1e-5"), "one delta for all points"),
        (("--sweep", RATES, "--at-most", "0"), "--at-most = 0"),
        (("--at-most", "2"), "belongs to --sweep"),
    ],
)
def test_a_sweep_of_which_a_point_is_wrong_is_not_submitted_at_all(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert sweep(*options) == 2
    assert words in capsys.readouterr().err
    assert queue.submitted() == []
    assert not (tmp_path / "s").exists()


def test_a_directory_that_holds_a_run_or_something_else_is_no_sweep(queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name, words in (("thesis.tex", "holds files but no run"), ("config.yaml", "holds a run")):
        (tmp_path / "s" / name).touch()
        with pytest.raises(InputError, match=words):
            raise_from(lambda: sweep("--sweep", RATES))
    assert queue.submitted() == []


def raise_from(call: Any) -> None:
    """What `main` would print."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpdist_launch.cli.InputError", type("Other", (Exception,), {}))
        call()


def test_values_are_yaml_and_may_hold_commas() -> None:
    assert axes(["a.b=0.1,1e-3,[1, 2],'x,y',null", "c.d=true"]) == {
        "a.b": [0.1, 1e-3, [1, 2], "x,y", None],
        "c.d": [True],
    }
