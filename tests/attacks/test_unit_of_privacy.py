"""A run that promises something to users, and attempts to get a user's promise for a record's price."""

from __future__ import annotations

import json

import numpy as np
import pytest
import userland
from jobs import EVERY, Jobs, Run, wait_all

from dpdist.release.export import export

UNIT = ("data.source=userland:owned", "data.unit=who", "data.records_per_unit=4")
OWNER = userland.owned()[0].take(np.arange(1000))["who"]  # type: ignore[attr-defined]
PEOPLE = len(np.unique(OWNER))


@pytest.fixture(scope="module")
def by_user(jobs: Jobs) -> Run:
    runs = [jobs.new(f"users-{processes}") for processes in (1, 2)]
    changes = (*UNIT, "sampling.expected_batch_size=32", "privacy.delta=1e-3", "training.physical_batch_size=4")
    wait_all([jobs.train(runs[0], *changes), *jobs.ranks(runs[1], 2, 1, *changes)])
    assert runs[0].summary["params_sha256"] == runs[1].summary["params_sha256"]
    return runs[0]


def test_users_are_counted_sampled_and_stated_and_not_records(by_user: Run, jobs: Jobs) -> None:
    summary = by_user.summary
    assert summary["dataset_size"] == PEOPLE < 300
    assert summary["sampling_probability"] == 32 / PEOPLE
    assert max(record["examples"] for record in by_user.diagnostics) < PEOPLE
    told = export(by_user.root, jobs.root / "by_user", without_guarantee=True)
    assert "value of the column 'who', such as all of one user, of which the first 4 at most are used" in told["unit"]
    assert "such as all of one user" in (jobs.root / "by_user/PRIVACY.md").read_text()


def test_how_many_records_are_left_out_is_private(by_user: Run) -> None:
    left_out = int(np.maximum(np.bincount(OWNER) - 4, 0).sum())
    assert left_out > 100
    first = json.loads((by_user.root / "private/probe.jsonl").read_text().splitlines()[0])
    assert first["records_left_out"] == left_out
    for path in by_user.root.glob("*.json*"):
        assert "left_out" not in path.read_text()


def test_a_run_of_records_cannot_go_on_as_one_of_users_nor_the_other_way_round(
    by_user: Run, single: Run, jobs: Jobs
) -> None:
    to_users = single.copy(jobs.new("to_users").root).crash(EVERY)
    to_records = by_user.copy(jobs.new("to_records").root).crash(EVERY)
    given = "sampling.expected_batch_size=32", "privacy.delta=1e-3"
    to_houses = by_user.copy(jobs.new("to_houses").root).crash(EVERY)
    attempts = (
        (
            to_houses,
            (*UNIT, *given, "data.options.by=2"),
            "who has which record, are not those that the run began with",
        ),
        (to_users, (*UNIT,), "the run began with None as its unit"),
        (to_records, ("data.source=userland:arrays", *given), "the run began with 'who'"),
    )
    for run, changes, words in attempts:
        before = run.content("ledger.jsonl", "checkpoints")
        ended = jobs.train(run, *changes).wait()
        assert ended.code == 2
        assert "data." in ended.err
        assert words in ended.err
        assert run.content("ledger.jsonl", "checkpoints") == before
