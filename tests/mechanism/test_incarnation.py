"""When the noise may be drawn again: only for steps of which nothing was seen, and with nothing changed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_ledger import PLAN

from dpdist.mechanism.incarnation import ResumePoint, StepInputs, reasons_for_new_incarnation
from dpdist.mechanism.ledger import Ledger

INPUTS = StepInputs(environment="jax 1 on cpu", settings="s", code="c", data="d")
WHOLE = ResumePoint(step=20, damaged=0, secret_lost=False, asked=False)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Of a run charged for 30 steps, with checkpoints of 10 and 20."""
    opened = Ledger(tmp_path / "ledger.jsonl")
    known = {"environment": INPUTS.environment, "settings": INPUTS.settings, "code": INPUTS.code, "data": INPUTS.data}
    opened.begin(dataclasses.replace(PLAN, **known))
    opened.reserve(0, 30)
    opened.record_saved(10)
    opened.record_saved(20)
    return opened


def reasons(
    ledger: Ledger, inputs: StepInputs = INPUTS, *, changed: list[str] | None = None, **resume: Any
) -> list[str]:
    return reasons_for_new_incarnation(ledger, inputs, dataclasses.replace(WHOLE, **resume), changed or [])


def test_the_newest_checkpoint_and_nothing_changed_keep_it(ledger: Ledger) -> None:
    assert reasons(ledger) == []


def test_a_checkpoint_newer_than_any_noted_keeps_it(ledger: Ledger) -> None:
    assert reasons(ledger, step=30) == []  # saved, and then the process died before it could note that


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": "other"}, "a setting changed"),
        ({"environment": "jax 2 on cpu"}, "jax 1 on cpu -> jax 2 on cpu"),
        ({"environment": "jax 1 on gpu"}, "jax 1 on cpu -> jax 1 on gpu"),
        ({"code": "other"}, "the code of the model"),
        ({"data": "other"}, "the training data"),
    ],
)
def test_whatever_a_step_depends_on_begins_a_new_one(ledger: Ledger, change: dict[str, Any], told: str) -> None:
    (reason,) = reasons(ledger, dataclasses.replace(INPUTS, **change))
    assert told in reason


def test_every_field_of_what_a_step_depends_on_is_looked_at(ledger: Ledger) -> None:
    for name in {field.name for field in dataclasses.fields(StepInputs)}:
        assert reasons(ledger, dataclasses.replace(INPUTS, **{name: "other"})), name


def test_changed_settings_are_named_where_they_are_known(ledger: Ledger) -> None:
    inputs, changed = dataclasses.replace(INPUTS, settings="other"), ["optimizer.learning_rate: 1 -> 2"]
    assert reasons(ledger, inputs, changed=changed) == changed
    assert reasons(ledger, changed=changed) == []  # the digest decides, not the words


def test_a_lost_secret_begins_a_new_one_and_is_not_taken_for_other_data(ledger: Ledger) -> None:
    assert reasons(ledger, dataclasses.replace(INPUTS, data="other"), secret_lost=True) == [
        "private/secret.key was lost"
    ]
    assert reasons(ledger, secret_lost=True) == ["private/secret.key was lost"]


def test_a_checkpoint_asked_for_begins_a_new_one_the_newest_included(ledger: Ledger) -> None:
    for step in (10, 20):
        assert reasons(ledger, step=step, asked=True) == [f"checkpoint.resume_step = {step}"]


def test_a_copy_begins_a_new_one_and_a_moved_run_does_not(ledger: Ledger, tmp_path: Path) -> None:
    moved, copied = tmp_path / "moved.jsonl", tmp_path / "copied.jsonl"
    shutil.copy(ledger.path, copied)
    ledger.path.rename(moved)
    assert reasons(Ledger(moved)) == []
    assert reasons(Ledger(copied)) == ["the run directory is a copy"]


def test_without_a_checkpoint_a_new_one_begins_once_a_step_was_charged(ledger: Ledger, tmp_path: Path) -> None:
    assert reasons(ledger, step=None) == ["no whole checkpoint is left"]
    new = Ledger(tmp_path / "new.jsonl")
    assert ledger.plan is not None
    new.begin(ledger.plan)
    assert reasons(new, step=None) == []


def test_behind_a_saved_checkpoint_a_new_one_always_begins(ledger: Ledger) -> None:
    """Whether it is gone or damaged, and though nothing has changed: what decides bits and data cannot all be seen."""
    for step, damaged in ((10, 20), (10, 0), (0, 0), (19, 0)):
        assert reasons(ledger, step=step, damaged=damaged) == [f"checkpoint 20 is gone, and {step} is older"]


def test_a_damaged_checkpoint_counts_though_nobody_noted_it(ledger: Ledger) -> None:
    assert reasons(ledger, step=20, damaged=25) == ["checkpoint 25 is gone, and 20 is older"]
    assert reasons(ledger, step=10, damaged=25) == ["checkpoint 25 is gone, and 10 is older"]
