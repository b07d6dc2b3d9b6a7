"""Training with `run.registry`: charged before the first step, once, and refused at the wall on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

from jobs import EVERY, STEPS, Jobs

from dpdist.joint.registry import create
from dpdist.joint.standing import standing
from dpdist.mechanism.accounting import epsilon

OWN_SECRET = "privacy.insecure_seed=null"


def test_a_run_is_charged_once_and_one_beyond_the_budget_takes_no_step(jobs: Jobs, tmp_path: Path) -> None:
    cost = epsilon(sampling_probability=0.064, noise_multiplier=4.0, steps=STEPS, delta=1e-4).epsilon
    create(tmp_path, "people", delta=1e-4, budget=1.1 * cost)
    given = (f"run.registry={tmp_path}", "run.registry_dataset=people")
    run = jobs.new("registered")
    assert jobs.train(run, OWN_SECRET, *given).wait().code == 0
    found = standing(tmp_path, "people")
    assert [each["steps"] for each in found["runs"]] == [STEPS]
    assert found["epsilon"] == cost == run.summary["epsilon"]
    note = json.loads((run.root / "private/registry.json").read_text())
    assert note["dataset"] == "people"

    run.crash(EVERY)
    assert jobs.train(run, OWN_SECRET, *given).wait().code == 0
    assert run.summary["status"] == "finished"
    assert standing(tmp_path, "people") == found, "a resumed run is charged already"

    second = jobs.new("beyond")
    ended = jobs.launch(second, 2, 1, OWN_SECRET, *given).wait()
    assert ended.code == 2
    assert ended.err.count("its budget is epsilon") >= 1
    assert not (second.root / "ledger.jsonl").exists()
    plain = jobs.new("plain")
    ended = jobs.train(plain, "privacy.enabled=false", *given).wait()
    assert ended.code == 2
    assert "adds no noise" in ended.err
    assert standing(tmp_path, "people") == found
