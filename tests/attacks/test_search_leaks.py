"""What somebody may try to get more out of a search than what it states the cost of: its trials, one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from jobs import Jobs

from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.joint.compose import compose
from dpdist.mechanism.ledger import Ledger
from dpdist.report.read import read_run
from dpdist.run.plan import plan_incarnation, plan_run
from dpdist.run.summary import OF_TRIAL, TRIAL, guarantee
from dpdist_launch.cli import main


@pytest.fixture(scope="module")
def finished(jobs: Jobs) -> Path:
    """The run directory of a trial, as `dpdist tune` has it trained."""
    run = jobs.new("trial")
    ended = jobs.train(run, "privacy.insecure_seed=null", "run.trial=true").wait()
    assert ended.code == 0, ended.err
    assert "by itself; it is a trial of a search" in ended.err
    assert "begins at step 0, with fresh samples" not in ended.err, "it is no later incarnation"
    return run.root


def as_it_is(root: Path) -> None:
    pass


def without_the_setting(root: Path) -> None:
    file = root / "config.yaml"
    file.write_text(file.read_text().replace("trial: true", "trial: false"))


def without_the_setting_and_the_summary(root: Path) -> None:
    without_the_setting(root)
    (root / "summary.json").unlink()


def with_a_summary_that_says_more(root: Path) -> None:
    without_the_setting(root)
    file = root / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guarantee": "holds"}))


@pytest.mark.parametrize(
    "change", [as_it_is, without_the_setting, without_the_setting_and_the_summary, with_a_summary_that_says_more]
)
def test_a_trial_that_was_copied_out_of_its_search_passes_for_no_run_of_its_own(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object
) -> None:
    root = tmp_path / "mine"
    shutil.copytree(finished, root)
    assert callable(change)
    change(root)
    assert read_run(root).guarantee == OF_TRIAL
    (tmp_path / "sweep.json").write_text(json.dumps({"asked": [[{"name": "mine"}]]}))
    for asked in (
        ["export", str(root), "--to", str(tmp_path / "given")],
        ["privacy", "compose", str(root)],
        ["privacy", "compose", str(tmp_path)],
        ["privacy", "gdp", str(root)],
    ):
        assert main(asked) == 2, asked
        assert OF_TRIAL in capsys.readouterr().err, asked


def test_an_export_that_was_forced_says_so_and_does_not_verify(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "given"
    assert main(["export", str(finished), "--to", str(to), "--without-guarantee"]) == 0
    assert "THIS MODEL COMES WITHOUT A PRIVACY GUARANTEE" in (to / "PRIVACY.md").read_text()
    assert main(["verify", str(to)]) == 1
    assert OF_TRIAL in capsys.readouterr().out
    with pytest.raises(InputError, match="a trial of a search"):
        compose([to])


def test_a_trial_that_goes_on_as_another_incarnation_stays_one(finished: Path, tmp_path: Path) -> None:
    config, ledger = configfile.load(finished / "config.yaml", ["run.trial=false"]), Ledger(finished / "ledger.jsonl")
    size = {"dataset_size": 1000, "coordinates": 650, "environment": "here"}
    later = plan_incarnation(config, ledger, start=0, reasons=["asked"], nonce=bytes(32), **size)
    assert later.reasons == [TRIAL, "asked"]
    assert guarantee(config, [later], finite=True) == OF_TRIAL
    assert plan_run(config, nonce=bytes(32), **size).reasons == []
