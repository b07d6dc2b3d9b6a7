"""What is given away: all that a receiver needs, nothing that is private, and no number that does not hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import yaml
from jobs import EVERY, STEPS, Ended, Jobs, Run
from private_runs import config_of
from safetensors.numpy import load_file

import dpdist
from dpdist.mechanism.accounting import epsilon
from dpdist.release.export import shareable
from dpdist.release.exported import REMOVED
from dpdist.release.foreign import special_tokens

OWN_SECRET = "privacy.insecure_seed=null"


@pytest.fixture(scope="module")
def secretive(jobs: Jobs) -> Run:
    run = jobs.new("secretive")
    assert jobs.train(run, OWN_SECRET).wait().code == 0
    return run


def export(jobs: Jobs, run: Run, *options: str, to: str = "given") -> tuple[Path, Ended]:
    target = run.root.with_name(f"{run.root.name}-{to}")
    return target, jobs.command("export", str(run.root), "--to", str(target), *options).wait()


@pytest.fixture(scope="module")
def exported(jobs: Jobs, secretive: Run) -> Path:
    target, ended = export(jobs, secretive)
    assert ended.code == 0, ended.err
    return target


def told(directory: Path) -> dict[str, object]:
    return json.loads((directory / "privacy.json").read_text())


def test_an_export_holds_five_files_with_the_trained_parameters(
    jobs: Jobs, secretive: Run, exported: Path, tmp_path: Path
) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "params.safetensors", "model.json", "config.yaml", "privacy.json", "PRIVACY.md",
    }  # fmt: skip
    jobs.call("load", runs={"run": str(secretive.root)}, to=str(tmp_path))
    expected, found = np.load(tmp_path / "run.npz"), load_file(exported / "params.safetensors")
    assert set(found) == set(expected) == set("abcd")
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
    assert told(exported)["params_sha256"] == secretive.summary["params_sha256"]


def test_the_statement_has_every_number_and_states_what_it_rests_on(secretive: Run, exported: Path) -> None:
    privacy, cost = told(exported), epsilon(sampling_probability=0.064, noise_multiplier=4.0, steps=STEPS, delta=1e-4)
    expected = {
        "guarantee": "holds",
        "epsilon": cost.epsilon,
        "epsilon_pld": cost.epsilon,
        "epsilon_rdp": cost.epsilon_rdp,
        "delta": 1e-4,
        "noise_multiplier": 4.0,
        "clip_norm": 1.0,
        "sampling_probability": 0.064,
        "expected_batch_size": 64,
        "steps": STEPS,
        "dataset_size": 1000,
        "dataset_size_is_public": True,
        "charged_steps": STEPS,
        "released_after_step": STEPS,
    }
    assert {name: privacy[name] for name in expected} == expected
    text = (exported / "PRIVACY.md").read_text()
    for part in (f"({cost.epsilon:.4g}, 0.0001)", "zero-out", "T = 16", "N = 1000", "test records", "float32"):
        assert part in text, part
    not_covered = text[text.index("## Not covered") : text.index("## Assumed")]
    for part in ("choices that rest on it", "read from storage", "a record that cannot be read", "how long steps take"):
        assert part in not_covered, part
    assert "WITHOUT" not in text


def test_no_secret_path_or_host_is_in_an_export(secretive: Run, exported: Path, jobs: Jobs) -> None:
    secret = (secretive.root / "private/secret.key").read_bytes()
    forms = [secret, secret.hex().encode(), base64.b64encode(secret), str(jobs.root).encode(), b"private/logs"]
    for path in exported.iterdir():
        assert not any(form in path.read_bytes() for form in forms), path
    settings = yaml.safe_load((exported / "config.yaml").read_text())
    assert not {"run", "checkpoint", "cluster"} & settings.keys()
    assert settings["optimizer"]["learning_rate"] == 0.5


def test_paths_in_settings_and_reasons_are_removed(jobs: Jobs, secretive: Run) -> None:
    run = secretive.copy(jobs.new("paths").root).crash(EVERY)
    given = ("data.source=userland:arrays_at", "data.path=/secret/place/data.npz", "optimizer.learning_rate=0.4")
    assert jobs.train(run, OWN_SECRET, *given).wait().code == 0
    records = run.ledger
    plan = next(record for record in records if record["record"] == "plan" and record["incarnation"] == 1)
    plan["reasons"] = ["model.options: {'pretrained': '/secret/place/w', 'x': 1} -> {'pretrained': '../other'}"]
    run.write_ledger(records)
    target, ended = export(jobs, run)
    assert ended.code == 0, ended.err
    for path in target.iterdir():
        assert b"secret/place" not in path.read_bytes(), path
        assert b"../other" not in path.read_bytes(), path


def test_all_incarnations_are_in_the_statement(jobs: Jobs, secretive: Run) -> None:
    run = secretive.copy(jobs.new("two").root).crash(EVERY)
    assert jobs.train(run, OWN_SECRET, "optimizer.learning_rate=0.4").wait().code == 0
    target, ended = export(jobs, run)
    assert ended.code == 0, ended.err
    privacy = told(target)
    assert privacy["epsilon"] == run.summary["epsilon"]
    assert privacy["epsilon_pld"] is None
    assert [each["charged_steps"] for each in privacy["incarnations"]] == [2 * EVERY, STEPS - EVERY]
    text = (target / "PRIVACY.md").read_text()
    assert "optimizer.learning_rate: 0.5 -> 0.4" in text
    assert "Renyi filter" in text


def read_by_others(run: Run) -> None:
    (run.root / "private/secret.key").chmod(0o640)


def cheaper_ledger(run: Run) -> None:
    run.write_ledger([record | ({"epsilon": 0.01} if record["record"] == "plan" else {}) for record in run.ledger])


def shorter_ledger(run: Run) -> None:
    run.write_ledger([record for record in run.ledger if record["record"] != "steps" or record["start"] < EVERY])


def no_ledger(run: Run) -> None:
    (run.root / "ledger.jsonl").unlink()


def flip_a_bit(run: Run) -> None:
    for path in (run.root / "checkpoints" / str(STEPS) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (read_by_others, "void: private/secret.key can be read by others"),
        (cheaper_ledger, "the ledger states epsilon 0.01"),
        (shorter_ledger, "does not charge incarnation 0"),
        (no_ledger, "what this run has spent is unknown"),
        (flip_a_bit, "is damaged"),
    ],
)
def test_what_does_not_hold_is_not_exported(
    jobs: Jobs, secretive: Run, harm: Callable[[Run], None], words: str
) -> None:
    run = secretive.copy(jobs.new("harmed").root)
    harm(run)
    target, ended = export(jobs, run)
    assert ended.code == 2
    assert words in ended.err
    assert not target.exists()


@pytest.mark.parametrize("setting", ["privacy.insecure_seed=1", "privacy.enabled=false"])
def test_a_run_without_a_guarantee_is_exported_only_on_demand_and_says_so_inside(jobs: Jobs, setting: str) -> None:
    run = jobs.new("void")
    assert jobs.train(run, setting).wait().code == 0
    target, ended = export(jobs, run)
    assert ended.code == 2
    assert "--without-guarantee" in ended.err
    assert not target.exists()
    target, ended = export(jobs, run, "--without-guarantee")
    assert ended.code == 0, ended.err
    assert "WITHOUT A PRIVACY GUARANTEE" in (target / "PRIVACY.md").read_text()
    assert not str(told(target)["guarantee"]).startswith("holds")
    assert not str(json.loads(ended.out)["guarantee"]).startswith("holds")


def test_nothing_is_overwritten(jobs: Jobs, secretive: Run, exported: Path) -> None:
    before = {path: path.read_bytes() for path in exported.iterdir()}
    target, ended = export(jobs, secretive)
    assert target == exported
    assert ended.code == 2
    assert "name a new or empty directory" in ended.err
    assert {path: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"tokenizer": "clinic-x/alice/tokenizer.json", "length": 64}, {"length": 64}),
        ({"classes": ["ham", "spam"], "size": 8}, {"classes": ["ham", "spam"], "size": 8}),
    ],
)
def test_options_of_a_source_go_along_only_where_they_are_public(options: dict[str, Any], kept: dict[str, Any]) -> None:
    base = {"privacy": {"enabled": False}, "training": {"steps": 1}}
    shared = shareable(dpdist.from_dict(base | {"data": {"source": "text", "path": "x", "options": options}}))
    assert {name: value for name, value in shared["data"]["options"].items() if value != REMOVED} == kept
    own = dpdist.from_dict(base | {"data": {"source": "mine:read", "options": {"db": "bob:pw@host", "size": 8}}})
    assert set(shareable(own)["data"]["options"].values()) == {REMOVED}


@pytest.mark.parametrize("value", ["postgres://bob:pw@host/patients", "~alice/data", "file:///srv/x", "rel/dir/a.csv"])
def test_a_place_in_a_models_option_is_removed_and_a_variant_is_none(value: str) -> None:
    model = {"name": "mine:model", "options": {"table": value, "variant": "B/16"}}
    config = dpdist.from_dict({"privacy": {"enabled": False}, "training": {"steps": 1}, "model": model})
    assert shareable(config)["model"]["options"] == {"table": REMOVED, "variant": "B/16"}


def test_special_tokens_are_those_of_the_tokenizer_or_of_the_weights_as_far_as_these_are_here(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(("[PAD]", "a", "<s>", "</s>"))}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": None, "eos_token_id": [7, 8], "n_head": 4}))

    def known(source: str, tokenizer: Path, weights: Path) -> dict[str, Any]:
        data = {"source": source, "path": "x", "options": {"tokenizer": str(tokenizer), "length": 4}}
        return special_tokens(config_of(data=data, model={"name": "gpt2", "options": {"pretrained": str(weights)}}))

    here, gone = tmp_path, tmp_path / "gone"
    (here / "model.safetensors").touch()
    assert known("text", here, here) == {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    assert known("text", gone, here / "model.safetensors") == {"eos_token_id": [7, 8]}
    assert known("own:data", here, here) == {"eos_token_id": [7, 8]}
    assert known("text", gone, gone) == {}
