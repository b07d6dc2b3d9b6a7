"""Plans: no target is passed, ever, whatever a later incarnation asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import dpdist
from dpdist.errors import InputError
from dpdist.mechanism.composition import Phase, adaptive_epsilon
from dpdist.mechanism.ledger import Ledger, LedgerError, Plan
from dpdist.run.plan import plan_incarnation, plan_run

SIZE: dict[str, Any] = {"dataset_size": 1000, "coordinates": 650, "environment": "here"}


def config(**privacy: Any) -> dpdist.Config:
    return dpdist.from_dict(
        {
            "privacy": {"delta": 1e-4} | privacy,
            "sampling": {"expected_batch_size": 100},
            "training": {"steps": 200},
        }
    )


def begun(path: Path, charged: int, **privacy: Any) -> Ledger:
    ledger = Ledger(path / "ledger.jsonl")
    ledger.begin(plan_run(config(**privacy), nonce=bytes(32), **SIZE))
    ledger.reserve(0, charged)
    return ledger


def go_on(ledger: Ledger, start: int, **privacy: Any) -> Plan:
    return plan_incarnation(config(**privacy), ledger, start=start, reasons=["asked"], nonce=b"\1" * 32, **SIZE)


def cost_of(ledger: Ledger) -> float:
    """What one step more would cost, once the plan is left: not below what is charged."""
    order = ledger.plans[0].private_terms().renyi_order
    charged = ledger.charged_to(0) + 1
    return adaptive_epsilon([Phase(0.1, 2.0, charged)], order=order, delta=1e-4)


@pytest.mark.parametrize("charged", [20, 100, 190])
@pytest.mark.parametrize("target", [2.8, 2.5, 2.0, 1.0])
def test_a_lowered_target_is_met_or_refused(tmp_path: Path, charged: int, target: float) -> None:
    """Where the first plan cost more, a target of 2 once was accepted, and 2.58 stated."""
    ledger = begun(tmp_path, charged, noise_multiplier=2.0)
    assert ledger.plans[0].private_terms().epsilon > 2.8
    if cost_of(ledger) > target:
        with pytest.raises(InputError, match="is spent"):
            go_on(ledger, charged, noise_multiplier=2.0, target_epsilon=target)
    else:
        plan = go_on(ledger, charged, noise_multiplier=2.0, target_epsilon=target)
        assert plan.private_terms().epsilon <= target
        ledger.begin(plan)


def test_a_target_that_the_first_plan_meets_pays_for_all_its_steps(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 100, noise_multiplier=2.0, target_epsilon=8.0)
    plan = go_on(ledger, 100, noise_multiplier=2.0, target_epsilon=8.0)
    assert plan.steps == 200
    assert plan.private_terms().epsilon <= 8.0


def test_no_plan_above_its_own_target_begins(tmp_path: Path) -> None:
    plan = plan_run(config(noise_multiplier=2.0), nonce=bytes(32), **SIZE)
    terms = dataclasses.replace(plan.private_terms(), target_epsilon=plan.private_terms().epsilon * 0.999)
    with pytest.raises(LedgerError, match="above its target"):
        Ledger(tmp_path / "ledger.jsonl").begin(dataclasses.replace(plan, privacy=terms))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_more_examples_than_a_device_can_number_are_refused() -> None:
    with pytest.raises(InputError, match="31 bits"):
        plan_run(config(noise_multiplier=2.0), nonce=bytes(32), **SIZE | {"dataset_size": 2**31})
