"""The moved record: what was trained on becomes a test record, whose accuracy is published exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import erasable
import pytest
import yaml
from jobs import EVERY, Jobs, Run, config_with

DIGITS = {"data": {"source": "digits"}, "model": {"name": "mlp", "classes": 10}, "training": {"steps": 2 * EVERY}}


@pytest.fixture(scope="module")
def digits(jobs: Jobs) -> Run:
    """A run whose own split decides which records are tested on."""
    run = jobs.new("digits")
    (summary,) = jobs.call("train_all", configs=[config_with(run.root, **DIGITS)])
    assert summary["status"] == "finished"
    return run


def again(jobs: Jobs, run: Run, **data: object) -> object:
    changed = DIGITS | {"data": DIGITS["data"] | data, "training": {"steps": 3 * EVERY}}
    (told,) = jobs.call("train_all", configs=[config_with(run.root, **changed)])
    return told


def without_tags(run: Run) -> None:
    """The ledger as a version of dpdist left it that did not note the test data."""

    def former(record: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in record.items() if name != "test_data"}

    run.write_ledger([former(record) for record in run.ledger])


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "a ledger of before"])
@pytest.mark.parametrize(("name", "value"), [("split_seed", 1), ("test_fraction", 0.4)])
def test_another_split_is_refused_and_shows_nothing(
    jobs: Jobs, digits: Run, name: str, value: float, noted: bool
) -> None:
    run = digits.copy(jobs.new("split").root)
    if not noted:
        without_tags(run)
    before = run.content("ledger.jsonl", "metrics.jsonl", "checkpoints")
    told = again(jobs, run, **{name: value})
    assert isinstance(told, list), told
    assert told[0] == f"data.{name}"
    assert "published" in told[2]
    assert run.content("ledger.jsonl", "metrics.jsonl", "checkpoints") == before


def test_other_test_records_are_refused_however_they_came_about(jobs: Jobs, digits: Run) -> None:
    """As by a function of the user's own that reads another file now, or takes other options."""
    run = digits.copy(jobs.new("moved").root)
    told = again(jobs, run, source="userland:items", options={})
    assert isinstance(told, list), told
    assert told[0] == "data.source"
    assert "test records" in told[2]


def test_a_test_set_that_a_run_had_not_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    shutil.copy(erasable.__file__, jobs.root)
    run, data = jobs.new("none"), {"source": "erasable:records", "options": {"erased": str(tmp_path / "erased")}}
    model, training = {"name": "erasable:linear"}, {"steps": EVERY}
    config = config_with(run.root, data=data, model=model, training=training)
    assert jobs.call("train_all", configs=[config])[0]["status"] == "finished"
    (tmp_path / "test").touch()
    config["training"] = config["training"] | {"steps": 2 * EVERY}
    (told,) = jobs.call("train_all", configs=[config])
    assert isinstance(told, list), told
    assert (told[0], "test records are not those" in told[2]) == ("data.source", True)


def test_the_training_records_as_test_records_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    """Their accuracy would be published exactly."""
    shutil.copy(erasable.__file__, jobs.root)
    (tmp_path / "all").touch()
    run, data = jobs.new("same"), {"source": "erasable:records", "options": {"erased": str(tmp_path / "erased")}}
    config = config_with(run.root, data=data, model={"name": "erasable:linear"}, training={"steps": EVERY})
    (told,) = jobs.call("train_all", configs=[config])
    assert isinstance(told, list), told
    assert (told[0], "training records themselves" in told[2]) == ("data.source", True)


def test_more_steps_over_the_same_split_go_on(jobs: Jobs, digits: Run) -> None:
    run = digits.copy(jobs.new("further").root)
    told = again(jobs, run)
    assert isinstance(told, dict), told
    assert (told["status"], told["incarnation"]) == ("finished", 1)
    assert yaml.safe_load((run.root / "config.yaml").read_text())["data"]["split_seed"] == 0
