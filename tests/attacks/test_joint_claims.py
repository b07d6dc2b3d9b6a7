"""Statements, sweeps and registries that say less than was spent, each consistent in itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from private_runs import config_of, more, private_run, restate, whole_export
from safetensors.numpy import load_file, save_file

from dpdist.errors import InputError
from dpdist.joint.compose import compose
from dpdist.joint.members import HOLDS, charges_of
from dpdist.joint.together import Charges, wall_cost
from dpdist.mechanism.accounting import KEPT, epsilon
from dpdist.mechanism.composition import ADAPTIVE, Phase, adaptive_epsilon
from dpdist.mechanism.ledger import Ledger
from dpdist.release.verify import verify
from dpdist.run.calibration import calibrate, calibrate_further_steps
from dpdist.run.summary import guarantee


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return whole_export(private_run(tmp_path / "run"), tmp_path / "export")


def facts_of(export: Path) -> dict[str, Any]:
    return dict(json.loads((export / "privacy.json").read_text()))


def wrong(export: Path) -> dict[str, list[str]]:
    """What `verify` finds wrong, by check."""
    found = verify(export)
    told = {check["check"]: check["wrong"] for check in found["checks"] if not check["holds"]}
    assert found["holds"] == (not told)
    return told


def nothing_charged(facts: dict[str, Any]) -> None:
    first, steps = facts["incarnations"][0], facts["steps"]
    second = first | {"incarnation": 1, "nonce": "ab" * 32, "start": steps, "reasons": ["a setting changed"]}
    facts["incarnations"] = [first | {"charged_steps": 0}, second | {"charged_steps": 0}]
    facts |= {"epsilon": 0.0, "epsilon_rdp": 0.0, "epsilon_pld": None, "accountant": ADAPTIVE, "charged_steps": 0}


def begins_beyond(facts: dict[str, Any]) -> None:
    first = facts["incarnations"][0]
    second = first | {"incarnation": 1, "nonce": "ab" * 32, "start": 60, "charged_steps": 40}
    facts["incarnations"] = [first | {"charged_steps": 50}, second]
    facts["charged_steps"] = 90


def begins_late(facts: dict[str, Any]) -> None:
    facts["incarnations"][0] |= {"start": 60, "charged_steps": 40}


def half_a_step(facts: dict[str, Any]) -> None:
    facts["incarnations"][0]["charged_steps"] = 99.5


def a_truth_for_a_count(facts: dict[str, Any]) -> None:
    facts["incarnations"][0]["charged_steps"] = True


def released_uncharged(facts: dict[str, Any]) -> None:
    facts["incarnations"][0]["charged_steps"] = facts["charged_steps"] = 99


def more_charged_than_planned(facts: dict[str, Any]) -> None:
    facts["incarnations"][0]["charged_steps"] = facts["charged_steps"] = facts["released_after_step"] = 101


@pytest.mark.parametrize(
    "change",
    [
        nothing_charged,
        begins_beyond,
        begins_late,
        half_a_step,
        a_truth_for_a_count,
        released_uncharged,
        more_charged_than_planned,
    ],
)
def test_steps_that_led_to_the_parameters_and_are_not_charged_are_found(
    export: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    assert not wrong(export)
    facts = facts_of(export)
    change(facts)
    restate(export, facts)
    assert "epsilon" in wrong(export)
    with pytest.raises(InputError, match=r"privacy\.json"):
        compose([export])


def test_incarnations_as_a_run_makes_them_are_read(tmp_path: Path) -> None:
    run = private_run(tmp_path / "run", done=False)
    Ledger(run / "ledger.jsonl").reserve(0, 60)
    more(run, steps=150, sigma=3.0, start=40)
    more(run, steps=180, sigma=2.5, start=50)
    given = whole_export(run, tmp_path / "given")
    assert charges_of(facts_of(given)) == Charges.of_ledger(Ledger(run / "ledger.jsonl"))
    assert "epsilon" not in wrong(given)
    assert compose([given])["epsilon"] == compose([run])["epsilon"]


TARGET = 1.0


@cache
def found() -> float:
    """The noise multiplier of `TARGET`."""
    return calibrate(target_epsilon=TARGET, sampling_probability=0.01, steps=100, delta=1e-5)


def calibrated_run(root: Path, *, sigma: float | None = None, target: float = TARGET) -> Path:
    privacy = {"noise_multiplier": None, "target_epsilon": target, "delta": 1e-5}
    return private_run(root, sigma=found() if sigma is None else sigma, privacy=privacy, training={"steps": 300})


def test_noise_beyond_what_the_target_asks_for_is_found_beside_other_incarnations_too(tmp_path: Path) -> None:
    def states(run: Path, target: float) -> bool:
        export = whole_export(run, tmp_path / f"export-of-{run.name}")
        facts = facts_of(export) | {"target_epsilon": target}
        restate(export, facts)
        return not wrong(export)

    assert states(calibrated_run(tmp_path / "true"), TARGET)
    assert not states(calibrated_run(tmp_path / "quiet", sigma=9.0), TARGET)
    # An incarnation that changes nothing hides it no more.
    twice = calibrated_run(tmp_path / "twice", sigma=9.0)
    more(twice, steps=101, sigma=9.0)
    assert not states(twice, TARGET)
    # One that pays for more steps, as a run plans it, and with more noise than it would.
    for name, factor, holds in (("longer", 1.0, True), ("louder", 1.5, False)):
        run = calibrated_run(tmp_path / name, target=3.0)
        charges = Charges.of_ledger(Ledger(run / "ledger.jsonl"))
        sigma = calibrate_further_steps(
            charges.phases, sampling_probability=0.01, steps=200, target_epsilon=3.0, order=charges.order, delta=1e-5
        )
        more(run, steps=300, sigma=factor * sigma)
        assert states(run, 3.0) is holds


def a_sweep(root: Path, **digests: str) -> Path:
    """Eight points that were asked for in one submission, each run with the settings whose digest is empty."""
    names = "abcdefgh"
    for name in names:
        private_run(root / name, steps=2000)
    asked = [{"name": name, "digest": digests.get(name, "")} for name in names]
    (root / "sweep.json").write_text(json.dumps({"asked": [asked]}))
    return root


def test_a_point_that_was_run_with_other_settings_was_not_asked_for_at_once(tmp_path: Path) -> None:
    assert compose([a_sweep(tmp_path / "true")])["at_once"]
    found = compose([a_sweep(tmp_path / "other", c="0" * 64)])
    assert not found["at_once"]
    assert found["at_once_by"] is None
    assert found["accountant"] == ADAPTIVE
    assert [note for note in found["notes"] if "other settings" in note and str(tmp_path / "other" / "c") in note]


def test_a_sweep_of_which_a_point_left_its_plan_does_not_say_at_once(tmp_path: Path) -> None:
    root = a_sweep(tmp_path / "sweep")
    more(root / "d", steps=2500, sigma=2.0, start=2000)
    found = compose([root])
    assert found["accountant"] == ADAPTIVE
    assert not found["at_once"]
    assert any("the sweep's record is not used" in note for note in found["notes"])


def plan_of(delta: float, *, more_steps: int = 0) -> Charges:
    first = Phase(0.01, 2.0, 100)
    return Charges(first=first, phases=(first, Phase(0.01, 2.0, more_steps)), delta=delta, order=20)


def test_the_delta_of_runs_that_kept_to_their_plans_is_counted_whole() -> None:
    delta = 1e-5
    fits, beyond = (1 - KEPT) * delta / 2, delta / 2
    assert wall_cost([plan_of(fits)] * 2, order=20, delta=delta) == pytest.approx(2 * plan_of(fits).alone().epsilon)
    filtered = adaptive_epsilon([Phase(0.01, 2.0, 200)], order=20, delta=delta)
    assert wall_cost([plan_of(beyond)] * 2, order=20, delta=delta) == pytest.approx(filtered)
    # Alone, it is the plan of one run, which a filter covers beyond it.
    assert wall_cost([plan_of(delta)], order=20, delta=delta) == plan_of(delta).alone().epsilon
    left = plan_of(delta, more_steps=1)
    assert wall_cost([left], order=20, delta=delta) == adaptive_epsilon(left.phases, order=20, delta=delta)


def said(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update({name: value})


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (said("not_covered", ["nothing"]), "words"),
        (said("assumptions", ["none"]), "words"),
        (said("covered", "everything, test records too"), "words"),
        (said("mechanism", "magic"), "words"),
        (said("public", ["nothing"]), "words"),
        (said("dataset_size_is_public", False), "words"),
        (said("unit", "everybody"), "config"),
        (said("guarantee", "holds not"), "guarantee"),
        (said("rho", 0.0), "constants"),
    ],
)
def test_words_and_numbers_that_dpdist_would_not_say_are_found(
    export: Path, change: Callable[[dict[str, Any]], None], check: str
) -> None:
    facts = facts_of(export)
    change(facts)
    restate(export, facts)
    assert check in wrong(export)


def test_the_guarantees_that_are_taken_are_those_that_a_run_states() -> None:
    privacy = {"noise_multiplier": 2.0, "delta": 1e-5}
    configs = [config_of(privacy=privacy | {"allow_large_delta": large}) for large in (False, True)]
    assert tuple(guarantee(config, finite=True) for config in configs) == HOLDS


def test_parameters_of_another_model_under_the_same_digest_are_found(export: Path) -> None:
    facts = facts_of(export)
    arrays = {name: array + 1 for name, array in load_file(export / "params.safetensors").items()}
    metadata = {"params_sha256": facts["params_sha256"], "guarantee": facts["guarantee"]}
    save_file(arrays, export / "params.safetensors", metadata=metadata)
    restate(export, facts)
    assert set(wrong(export)) == {"parameters"}


def test_a_file_that_no_export_has_is_found_also_where_the_statement_names_it(export: Path) -> None:
    (export / "pytorch_model.bin").write_bytes(b"pickle")
    restate(export, facts_of(export))
    assert "pytorch_model.bin" in wrong(export)["files"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: '{"epsilon": 0.1, ' + text[1:],
        lambda text: text.replace('"rho": 1e-06', '"rho": NaN'),
        lambda text: text.replace('"rho": 1e-06', '"rho": Infinity'),
        lambda text: "[" * 100_000,
        lambda text: '{"incarnations": ' * 100_000,
    ],
)
def test_a_statement_that_can_be_read_in_two_ways_or_in_none_is_no_statement(
    export: Path, change: Callable[[str], str]
) -> None:
    path = export / "privacy.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    assert set(wrong(export)) == {"statement"}
    with pytest.raises(InputError, match="is damaged"):
        compose([export])


def test_a_config_of_brackets_is_wrong_and_no_crash(export: Path) -> None:
    (export / "config.yaml").write_text("data: " + "[" * 20_000 + "]" * 20_000)
    restate(export, facts_of(export))
    assert "config" in wrong(export)


def test_one_run_is_stated_at_the_delta_that_is_asked_for_or_refused(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    found = compose([run], delta=1e-7)
    assert found["delta"] == 1e-7
    assert found["epsilon"] == epsilon(sampling_probability=0.01, noise_multiplier=2.0, steps=100, delta=1e-7).epsilon
    assert found["epsilon"] > compose([run], delta=1e-5)["epsilon"] == compose([run])["epsilon"]
    more(run, steps=300, sigma=1.5)
    with pytest.raises(InputError, match="holds at its own delta"):
        compose([run], delta=1e-7)


def test_an_export_whose_constants_cost_less_than_it_states_is_not_composed(export: Path, tmp_path: Path) -> None:
    """A joint bound is computed from the constants: a sigma that somebody has raised would lower it."""
    other = private_run(tmp_path / "other")
    assert compose([export, other])["epsilon"] > 0
    facts = facts_of(export)
    facts["noise_multiplier"] *= 10
    facts["incarnations"][0]["noise_multiplier"] *= 10
    (export / "privacy.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="its constants cost"):
        compose([export, other])
