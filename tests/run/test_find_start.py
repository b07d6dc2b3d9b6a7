"""Where a run goes on from: the ledger and the checkpoints that an earlier version of dpdist left are understood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from saves import state

import dpdist
from dpdist.errors import InputError
from dpdist.mechanism.incarnation import StepInputs
from dpdist.mechanism.keys import Secret
from dpdist.mechanism.ledger import Ledger
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.resume import ResumeRequest, Start, find_start

FORMER = Path(__file__).parents[1] / "mechanism/ledgers/two_incarnations.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Of two incarnations, 12 steps charged, with the ledger as it was written before `PrivacyTerms`."""
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    shutil.copy(FORMER, directory.ledger)
    return directory


def former_plan(incarnation: int) -> dict[str, Any]:
    """A plan as checkpoints of that time hold it."""
    records = [json.loads(line) for line in FORMER.read_text().splitlines()]
    plan = [record for record in records if record["record"] == "plan"][incarnation]
    return {name: value for name, value in plan.items() if name not in ("record", "file")}


def request(run: RunDirectory, checkpoints: Checkpoints, **training: Any) -> ResumeRequest:
    config = dpdist.from_dict(
        {
            "model": {"name": "mlp"},
            "privacy": {"noise_multiplier": 4.0, "delta": 1e-4, "insecure_seed": 1},
            "sampling": {"expected_batch_size": 32},
            "training": {"steps": 8} | training,
            "checkpoint": {"resume_step": 4},
            "run": {"dir": str(run.root)},
        }
    )
    plan = former_plan(1)
    return ResumeRequest(
        config=config,
        run=run,
        checkpoints=checkpoints,
        secret=Secret.from_insecure_seed(1),
        secret_lost=False,
        inputs=StepInputs(**{name: plan[name] for name in ("environment", "settings", "code", "data")}),
        dataset_size=1437,
        test_data="t",
        test_digest="d",
        tested=True,
        coordinates=650,
    )


def saved(run: RunDirectory, step: int, plan: dict[str, Any]) -> Checkpoints:
    checkpoints = Checkpoints(run.checkpoints, keep=5)
    checkpoints.save(step, state(), {"plan": plan, "step": step})
    checkpoints.wait()
    return checkpoints


def original(run: RunDirectory) -> Ledger:
    """The ledger, as if this were the directory that it was written in."""
    ledger = Ledger(run.ledger)
    ledger.copied = False
    return ledger


def test_a_checkpoint_of_before_is_gone_on_from(run: RunDirectory) -> None:
    start = find_start(request(run, saved(run, 8, former_plan(1))), original(run))
    assert (start.fresh, start.step, start.plan.incarnation) == (False, 8, 1)
    assert start.decisions is not None
    assert Start.from_record(json.loads(json.dumps(start.to_record()))) == start


def test_a_run_of_before_pays_for_all_that_it_was_charged(run: RunDirectory) -> None:
    start = find_start(request(run, saved(run, 8, former_plan(1)), steps=16), Ledger(run.ledger))
    assert (start.fresh, start.step, start.plan.incarnation) == (True, 8, 2)
    assert "the run directory is a copy" in start.plan.reasons
    terms, before = start.plan.private_terms(), former_plan(1)["epsilon"]
    assert terms.renyi_order == former_plan(0)["renyi_order"]
    assert terms.accountant == "renyi filter"
    assert terms.epsilon > before
    assert start.decisions is None


def test_a_checkpoint_made_under_another_plan_is_refused(run: RunDirectory) -> None:
    for change in ({"noise_multiplier": 5.0}, {"renyi_order": 2}, {"unknown": 1}):
        checkpoints = saved(run, 8, former_plan(1) | change)
        with pytest.raises(InputError, match="not the one that checkpoint 8 was made under"):
            find_start(request(run, checkpoints), original(run))
        checkpoints.set_aside(8, run.abandoned)
    missing = former_plan(1)
    del missing["delta"]
    with pytest.raises(InputError, match="not the one that checkpoint 8 was made under"):
        find_start(request(run, saved(run, 8, missing)), original(run))


def test_a_damaged_checkpoint_that_nobody_noted_stays_evidence_until_the_ledger_has_what_follows(
    run: RunDirectory,
) -> None:
    """The job may die between any two of these looks, which must not forget what the one before has seen."""
    records = [json.loads(line) for line in run.ledger.read_text().splitlines()]
    run.ledger.write_text("".join(json.dumps(record) + "\n" for record in records if record["record"] != "saved"))
    saved(run, 6, former_plan(1)).close()
    checkpoints = saved(run, 8, former_plan(1))
    (run.checkpoints / "8/meta/metadata").write_text("{}")
    for _ in range(2):
        start = find_start(request(run, checkpoints), original(run))
        assert (start.fresh, start.step, start.plan.incarnation) == (True, 6, 2)
        assert start.plan.reasons == ["checkpoint 8 is gone, and 6 is older"]
