"""What a recipient's check finds: files and numbers that were changed, in every way that an export alone can show."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Jobs
from safetensors.numpy import load_file, save_file

from dpdist.errors import InputError
from dpdist.joint.selection import Law, binding_orders, search_cost, trial_divergences
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import Phase
from dpdist.release.statement import SearchedFor, of_search
from dpdist.release.statement import as_text as statement_text
from dpdist.release.verify import as_text, verify
from dpdist_launch.cli import main


@pytest.fixture(scope="module")
def given(jobs: Jobs) -> Path:
    run = jobs.new("verified")
    assert jobs.train(run, "privacy.insecure_seed=null").wait().code == 0
    target = run.root.with_name("verified-export")
    ended = jobs.command("export", str(run.root), "--to", str(target)).wait()
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)["statement_sha256"]
    assert printed == hashlib.sha256((target / "privacy.json").read_bytes()).hexdigest()
    assert "statement_sha256" not in json.loads((target / "privacy.json").read_text())
    return target


@pytest.fixture
def export(given: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(given, tmp_path / "export"))


def wrong(export: Path, **options: Any) -> dict[str, list[str]]:
    """What is wrong, by check."""
    found = verify(export, **options)
    told = {check["check"]: check["wrong"] for check in found["checks"] if not check["holds"]}
    assert found["holds"] == (not told)
    assert as_text(found).startswith("HOLDS" if not told else "DOES NOT HOLD")
    return told


def test_an_export_holds_and_says_what_is_taken_on_trust(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(export)
    assert found["holds"]
    assert found["recomputed"]["epsilon"] == found["epsilon"]
    assert 0.5 < found["right_guesses_at_most"] < 1
    assert main(["verify", str(export)]) == 0
    text = capsys.readouterr().out
    for part in ("HOLDS", "privacy loss distributions", "Renyi", "Taken on trust", "secret", "--expect"):
        assert part in text, part
    assert main(["verify", str(export), "--json", "--expect", found["statement_sha256"]]) == 0
    assert not any("--expect" in item for item in json.loads(capsys.readouterr().out)["on_trust"])
    assert main(["verify", str(export), "--expect", "0" * 64]) == 1


def test_what_is_no_export_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"has no privacy\.json"):
        verify(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2
    (tmp_path / "privacy.json").write_text("[]")
    assert main(["verify", str(tmp_path)]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def other_weights(export: Path) -> None:
    arrays = load_file(export / "params.safetensors")
    name = next(iter(arrays))
    save_file(arrays | {name: arrays[name] + 1}, export / "params.safetensors")


def a_bit(export: Path) -> None:
    content = bytearray((export / "params.safetensors").read_bytes())
    content[-3] ^= 1
    (export / "params.safetensors").write_bytes(content)


def no_weights(export: Path) -> None:
    (export / "params.safetensors").unlink()


def one_more(export: Path) -> None:
    (export / "pytorch_model.bin").write_bytes(b"x")


def a_link(export: Path) -> None:
    (export / "config.yaml").rename(export.parent / "elsewhere")
    (export / "config.yaml").symlink_to(export.parent / "elsewhere")


def a_setting(export: Path) -> None:
    path = export / "config.yaml"
    path.write_text(path.read_text().replace("noise_multiplier: 4.0", "noise_multiplier: 5.0"))


def a_word(export: Path) -> None:
    path = export / "PRIVACY.md"
    path.write_text(path.read_text().replace("zero-out", "any"))


@pytest.mark.parametrize("harm", [other_weights, a_bit, no_weights, one_more, a_link, a_setting, a_word])
def test_a_file_that_was_changed_removed_or_added_is_found(export: Path, harm: Callable[[Path], None]) -> None:
    harm(export)
    assert "files" in wrong(export)


def rewrite(export: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the statement as a careful liar does: PRIVACY.md and all digests follow."""
    path = export / "privacy.json"
    facts = json.loads(path.read_text())
    change(facts)
    (export / "PRIVACY.md").write_text(statement_text(facts))
    redigest(export, facts)


def redigest(export: Path, facts: dict[str, Any] | None = None) -> None:
    path = export / "privacy.json"
    facts = json.loads(path.read_text()) if facts is None else facts
    for name in facts.get("files", {}):
        facts["files"][name] = hashlib.sha256((export / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(facts))


def smaller(facts: dict[str, Any]) -> None:
    facts.update(epsilon=facts["epsilon"] * 0.9, epsilon_pld=facts["epsilon"] * 0.9)


def a_little_smaller(facts: dict[str, Any]) -> None:
    facts.update(epsilon=facts["epsilon"] * 0.9999, epsilon_pld=facts["epsilon"] * 0.9999)


def not_a_number(facts: dict[str, Any]) -> None:
    facts.update(epsilon=float("nan"), epsilon_pld=float("nan"))


def everywhere(facts: dict[str, Any], **changes: Any) -> None:
    facts.update(changes)
    facts["incarnations"][-1].update({n: v for n, v in changes.items() if n in facts["incarnations"][-1]})


def more_noise(facts: dict[str, Any]) -> None:
    everywhere(facts, noise_multiplier=6.0)


def more_noise_and_its_epsilon(facts: dict[str, Any]) -> None:
    spent = epsilon(
        sampling_probability=facts["sampling_probability"],
        noise_multiplier=6.0,
        steps=facts["steps"],
        delta=facts["delta"],
    )
    everywhere(
        facts, noise_multiplier=6.0, epsilon=spent.epsilon, epsilon_pld=spent.epsilon, epsilon_rdp=spent.epsilon_rdp
    )


def fewer_steps(facts: dict[str, Any]) -> None:
    everywhere(facts, steps=4)


def a_later_step(facts: dict[str, Any]) -> None:
    facts["released_after_step"] += 1


def more_records(facts: dict[str, Any]) -> None:
    everywhere(facts, dataset_size=facts["dataset_size"] * 2)


def larger_delta(facts: dict[str, Any]) -> None:
    facts["delta"] = 1e-2


def another_unit(facts: dict[str, Any]) -> None:
    facts["unit_name"] = "all records with one value of 'user'"


def another_neighbour(facts: dict[str, Any]) -> None:
    facts["adjacency"] = "swap"


def a_grid_too_coarse(facts: dict[str, Any]) -> None:
    facts["rho"] = 0.5


def no_digests(facts: dict[str, Any]) -> None:
    del facts["files"]


def no_incarnations(facts: dict[str, Any]) -> None:
    facts["incarnations"] = []


def a_place_elsewhere(facts: dict[str, Any]) -> None:
    facts["files"]["../export/model.json"] = ""


def without_the_weights(facts: dict[str, Any]) -> None:
    del facts["files"]["params.safetensors"]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (smaller, "epsilon"),
        (a_little_smaller, "epsilon"),
        (not_a_number, "statement"),
        (more_noise, "epsilon"),
        (more_noise_and_its_epsilon, "config"),
        (fewer_steps, "constants"),
        (a_later_step, "constants"),
        (more_records, "constants"),
        (larger_delta, "constants"),
        (another_unit, "config"),
        (another_neighbour, "constants"),
        (a_grid_too_coarse, "constants"),
        (no_digests, "files"),
        (no_incarnations, "epsilon"),
        (a_place_elsewhere, "files"),
        (without_the_weights, "files"),
    ],
)
def test_a_number_that_was_changed_with_care_is_found(
    export: Path, change: Callable[[dict[str, Any]], None], check: str
) -> None:
    rewrite(export, change)
    assert check in wrong(export)


def test_what_is_no_number_is_wrong_and_no_crash(export: Path) -> None:
    facts, unnoticed = json.loads((export / "privacy.json").read_text()), set()
    for name, right in facts.items():
        for value in (None, "many", [], -1, 0):
            (export / "privacy.json").write_text(json.dumps(facts | {name: value}))
            if value != right and not as_text(verify(export)).startswith("DOES NOT HOLD"):
                unnoticed.add(name)
    assert unnoticed <= {"dataset_size_is_public", "environment", "renyi_order"}, "words, and an order that is not used"
    (export / "privacy.json").write_text("[" * 100_000)
    assert as_text(verify(export)).startswith("DOES NOT HOLD")


def test_no_code_that_an_export_names_is_run(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = export / "config.yaml"
    path.write_text(path.read_text().replace("userland:small", "evil:small"))
    redigest(export)
    assert verify(export)["holds"]
    assert not (tmp_path / "ran").exists()


def test_a_void_guarantee_is_none(export: Path) -> None:
    rewrite(export, lambda facts: facts.update(guarantee="void: privacy.insecure_seed"))
    assert "guarantee" in wrong(export)


def test_parameters_that_are_not_finite_are_found(export: Path) -> None:
    path, facts = export / "params.safetensors", json.loads((export / "privacy.json").read_text())
    arrays = load_file(path)
    name = next(iter(arrays))
    arrays[name].flat[0] = np.inf
    save_file(arrays, path, metadata={"params_sha256": facts["params_sha256"], "guarantee": "holds"})
    redigest(export)
    assert set(wrong(export)) == {"weights"}


def as_search(facts: dict[str, Any], *, bound: float = 4.0) -> None:
    law, trial = Law(8.0, 1.0), Phase(facts["sampling_probability"], bound, facts["steps"])
    losses = trial_divergences(trial)
    terms = {
        "trial": {"sampling_probability": trial.sampling_probability, "noise_multiplier": bound, "steps": trial.steps},
        "orders": list(binding_orders(losses, law, facts["delta"])),
        "epsilon_of_one_trial": facts["epsilon"],
        "metric": {"name": "accuracy", "best": "highest"},
    }
    cost = search_cost(losses, law, facts["delta"]).epsilon
    record = law.to_record() | terms
    searched = SearchedFor(epsilon=cost, delta=facts["delta"], record=record, guarantee="holds")
    facts |= of_search(facts, searched)


def test_the_best_of_a_search_holds_at_what_the_whole_search_costs(given: Path, export: Path) -> None:
    rewrite(export, as_search)
    found = verify(export)
    assert found["holds"], found["checks"]
    assert found["epsilon"] > verify(given)["epsilon"]
    assert found["right_guesses_at_most"] > verify(given)["right_guesses_at_most"]
    rewrite(export, lambda facts: facts.update(epsilon=1.0, epsilon_rdp=1.0))
    assert "epsilon" in wrong(export)


def test_a_search_that_says_fewer_trials_or_a_dearer_one_is_found(export: Path) -> None:
    rewrite(export, as_search)
    rewrite(export, lambda facts: facts["search"].update(expected_trials=2.0))
    assert "epsilon" in wrong(export)
    rewrite(export, lambda facts: facts["search"].update(expected_trials=8.0))
    assert not wrong(export)
    rewrite(export, lambda facts: facts["search"]["trial"].update(noise_multiplier=9.0))
    assert "epsilon" in wrong(export)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon_of_one_trial", 0.001),
        ("distribution", "fixed, known to all"),
        ("epsilon", 0.1),
        ("metric", {"name": "none", "best": "any"}),
    ],
)
def test_words_and_numbers_of_a_search_that_follow_from_others_are_compared(
    export: Path, name: str, value: Any
) -> None:
    rewrite(export, as_search)
    rewrite(export, lambda facts: facts["search"].update({name: value}))
    assert set(wrong(export)) == {"words"}


def test_whoever_changes_all_consistently_is_found_by_the_senders_digest_alone(given: Path, export: Path) -> None:
    sent = verify(given)["statement_sha256"]
    rewrite(export, more_noise_and_its_epsilon)
    path = export / "config.yaml"
    path.write_text(path.read_text().replace("noise_multiplier: 4.0", "noise_multiplier: 6.0"))
    redigest(export)
    found = verify(export)
    assert found["holds"]
    assert any("the sender's word" in item for item in found["on_trust"])
    assert any("--expect" in item for item in found["on_trust"])
    assert set(wrong(export, expect=sent)) == {"sender"}
