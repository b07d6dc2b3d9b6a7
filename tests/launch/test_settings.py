"""`dpdist settings` and its page: every key is there, the page is fresh, and what it says of a change is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpdist import config
from dpdist.config.section import fields_of
from dpdist.errors import InputError
from dpdist.run.step_settings import step_settings
from dpdist_launch.cli import main
from dpdist_launch.settings import FIXED, KEPT, NEW, REFUSED, as_markdown, settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["settings", *argv]) == 0
    return capsys.readouterr().out


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == as_markdown(), "stale: run `dpdist settings --markdown > docs/settings.md`"


def test_every_key_has_a_type_a_sentence_and_what_a_change_does() -> None:
    found = {each.name: each for each in settings()}
    plain = config.flatten(config.from_dict({"training": {"steps": 1}, "privacy": {"enabled": False}}))
    assert found.keys() == plain.keys()
    for name, each in found.items():
        assert each.meaning.endswith("."), f"{name} lacks a `#:` sentence above it"
        assert each.type
        assert each.on_change in (KEPT, NEW, REFUSED)
        if name not in ("training.steps", "privacy.enabled", "optimizer.learning_rate"):  # given, or 1 for sgd
            assert each.default == plain[name]


def test_each_command_prints_the_same_settings(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, "--json"))
    text, page = printed(capsys), printed(capsys, "--markdown")
    assert page == as_markdown()
    assert list(told) == config.setting_names()
    assert told["privacy.clip_norm"] == {
        "type": "float, [1e-06, 1e+06]",
        "default": 1.0,
        "meaning": "Largest L2 norm an example's gradient keeps.",
        "on_change": NEW,
        "on_change_note": "",
    }
    heads = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert heads == list(told)
    columns = {line.index("default ") for line in text.splitlines() if not line.startswith(" ")}
    assert len(columns) == 1
    for name in told:
        assert f"| `{name.partition('.')[2]}` |" in page


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("CLIP_norm", {"privacy.clip_norm"}),
        ("clip", {"privacy.clip_norm", "training.clipping", "training.clipping_strategies"}),
        ("*.steps", {"training.steps"}),
        (
            "run.*",
            {"run.dir", "run.log_every", "run.progress", "run.plots", "run.on_event"}
            | {"run.registry", "run.registry_dataset", "run.trial"},
        ),
        ("optimizer.b[12]", {"optimizer.b1", "optimizer.b2"}),
    ],
)
def test_a_pattern_is_a_part_of_the_name_or_a_glob(
    capsys: pytest.CaptureFixture[str], pattern: str, names: set[str]
) -> None:
    assert set(json.loads(printed(capsys, pattern, "--json"))) == names


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("privacy.clipnorm", "privacy.clip_norm"),
        ("lerning_rate", "optimizer.learning_rate"),
        ("privcy.*", "privacy"),
        ("epsilonn", "privacy.target_epsilon"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest(pattern: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"matches no setting; did you mean {meant}\?") as caught:
        settings(pattern)
    assert (caught.value.field, caught.value.value) == ("PATTERN", pattern)


def test_the_page_takes_no_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "clip", "--markdown"]) == 2
    assert "leave it out" in capsys.readouterr().err


#: Another value of every setting of the privacy section.
OTHER: dict[str, Any] = {
    "enabled": False,
    "target_epsilon": 9.0,
    "delta": 1e-6,
    "noise_multiplier": 5.0,
    "clip_norm": 2.0,
    "noise_placement": "fused",
    "insecure_seed": 7,
    "allow_large_delta": True,
}


def test_what_is_refused_is_what_no_one_statement_could_cover() -> None:
    from dpdist.run import resume
    from dpdist.run.plan import plan_run

    base: dict[str, Any] = {
        "training": {"steps": 1},
        "sampling": {"expected_batch_size": 64},
        "privacy": {"noise_multiplier": 4.0, "delta": 1e-5},
    }
    before = config.from_dict(base)
    plan = plan_run(before, dataset_size=1000, coordinates=650, nonce=bytes(32), environment="here")
    refused = set()
    for key, value in OTHER.items():
        after = config.from_dict(base | {"privacy": base["privacy"] | {key: value}})
        assert config.flatten(after) != config.flatten(before), key
        try:
            resume._require_one_statement(after, plan)
        except InputError as error:
            refused.add(error.field)
    assert OTHER.keys() == fields_of(config.Privacy).keys()
    refused |= set(resume.SPLIT)  # tests/attacks/test_split.py
    refused |= {"data.unit"}  # tests/attacks/test_unit_of_privacy.py
    assert refused == set(FIXED) == {each.name for each in settings() if each.on_change == REFUSED}


def test_what_is_kept_is_what_no_step_depends_on() -> None:
    """`checkpoint.resume_step` changes no step, but goes back to one that is charged already."""
    names = config.setting_names()
    kept = {each.name for each in settings() if each.on_change == KEPT}
    assert kept == set(names) - step_settings(dict.fromkeys(names)).keys() - {"checkpoint.resume_step"}
    assert "run.plots" in kept
