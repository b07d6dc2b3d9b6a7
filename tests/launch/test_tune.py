"""A search without a training: what a resume finds, what counts as failed, and which trial is released."""

from __future__ import annotations

import json
import math
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import AXES, DATA, begin, keep_secret, question

from dpdist.errors import InputError
from dpdist.joint.selection import Law, search_cost, trial_divergences
from dpdist.mechanism.ledger import Ledger, Plan, PrivacyTerms, file_identity
from dpdist.run.fingerprints import data_tags
from dpdist.run.summary import OF_TRIAL, TRIAL
from dpdist_launch.tune import best, terms
from dpdist_launch.tune.metric import Metric
from dpdist_launch.tune.search import ATTEMPTS, Search, Trial, open_directory


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a search of ten trials, of which none has begun."""
    root = tmp_path_factory.mktemp("tune") / "s"
    keep_secret(open_directory(root), law=question().law, number=10)
    assert begin(root).number == 10
    return root


@pytest.fixture
def search(template: Path, tmp_path: Path) -> Search:
    """A search of its own of ten trials."""
    copied = shutil.copytree(template, tmp_path / "s")
    log = copied / "private/trials.jsonl"
    record = json.loads(log.read_text()) | file_identity(copied / "private/secret.key")
    log.write_text(json.dumps(record) + "\n")  # for the original
    return begin(copied)


def train(
    search: Search,
    trial: Trial,
    accuracy: float | None,
    *,
    sigma: float = 1.0,
    mark: str = TRIAL,
    data: dict[str, bytes] | None = None,
    **more: Any,
) -> None:
    """What the run of a trial leaves; `sigma` is relative to what it must be, and `mark` is its ledger's."""
    search.begin(trial)
    assert trial.config is not None
    assert trial.plan is not None
    terms = PrivacyTerms(
        clip_norm=1.0,
        noise_multiplier=trial.plan.noise_multiplier * sigma,
        delta=1e-4,
        epsilon=1.0,
        epsilon_rdp=1.0,
        accountant="pld",
        renyi_order=8,
    )
    tags = data_tags(trial.run.read_secret(), DATA if data is None else data)
    plan = Plan(
        incarnation=0,
        nonce=search._secret.derive(trial.name, size=32).hex(),
        environment="",
        adjacency="",
        dataset_size=1000,
        sampling_probability=trial.plan.sampling_probability,
        expected_batch_size=64.0,
        steps=trial.plan.steps,
        steps_asked=trial.plan.steps,
        privacy=terms,
        reasons=[mark],
        data=tags["training data"],
        test_data=tags["test data"],
    )
    ledger = Ledger(trial.run.ledger)
    ledger.begin(plan)
    ledger.reserve(0, trial.plan.steps)
    search.watch(trial)
    trial.run.begin(trial.config)
    summary = {
        "status": "finished",
        "guarantee": OF_TRIAL,
        "metrics": {"accuracy": accuracy},
        "steps": trial.plan.steps,
    }
    trial.run.write_summary(summary | {"noise_multiplier": terms.noise_multiplier} | more)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which run directories were exported."""
    found: list[Path] = []

    def export(run: Path, to: Path, *, searched: object) -> dict[str, str]:
        to.mkdir()
        found.append(run)
        return {"params_sha256": "abc"}

    monkeypatch.setattr(best, "export", export)
    return found


# A search that goes on.


def test_a_search_that_goes_on_draws_nothing_again(search: Search) -> None:
    again = begin(search.root)
    assert again.number == search.number
    assert again.trials == search.trials
    assert again.terms == search.terms
    assert len({trial.name for trial in search.trials}) == search.number


def test_a_trials_name_tells_nothing_of_its_place(search: Search, tmp_path: Path) -> None:
    other = begin(tmp_path / "other")
    assert not {trial.name for trial in search.trials} & {trial.name for trial in other.trials}


def test_a_kill_before_anything_is_fixed_costs_no_second_draw(search: Search) -> None:
    search.description.unlink()
    again = begin(search.root)
    assert (again.number, again.trials) == (search.number, search.trials)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"law": Law(5.0, 1.0)}, "law is another (expected_trials: 4.0 -> 5.0)"),
        ({"law": Law(4.0, 0.0)}, "law is another"),
        ({"axes": AXES | {"privacy.clip_norm": [1.0, 3.0]}}, "space is another"),
        ({"metric": Metric("loss", highest=False)}, "metric is another"),
        ({"metric": Metric("accuracy", highest=False)}, "metric is another"),
        ({"dataset_size": 1001}, "dataset_size is another"),
        ({"privacy": {"target_epsilon": 3.0}}, "settings is another (privacy.target_epsilon: 2.0 -> 3.0)"),
    ],
)
def test_what_was_fixed_before_the_first_trial_cannot_be_changed(
    search: Search, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        begin(search.root, question(**changes))
    assert words in str(caught.value)


def test_a_copy_of_a_search_does_not_go_on_beside_it(search: Search, tmp_path: Path) -> None:
    copied = shutil.copytree(search.root, tmp_path / "copy")
    with pytest.raises(InputError, match="is a copy of a search"):
        begin(copied)
    search.root.rename(tmp_path / "moved")
    assert begin(tmp_path / "moved").trials[0].name == search.trials[0].name


@pytest.mark.parametrize("name", ["step_code_digest", "environment"])
def test_all_trials_are_of_one_code(search: Search, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The bound is of the best of trials of one kind."""
    monkeypatch.setattr(terms, name, lambda _: "other")
    with pytest.raises(InputError, match=r"is another \(.* -> other\)"):
        begin(search.root)


@pytest.mark.parametrize("part", ["training data", "test data"])
def test_all_trials_are_of_one_dataset(search: Search, part: str) -> None:
    """`data.path` may change, as data may move; what is there may not."""
    with pytest.raises(InputError, match=f"the {part} are not those that the search began with"):
        begin(search.root, question(fingerprints=DATA | {part: b"other"}))
    told = search.description.read_text()
    tags = json.loads((search.private / "trials.jsonl").read_text())["data"]
    assert tags.keys() == {"training data", "test data"}
    assert not [tag for tag in tags.values() if tag in told], "a public tag would stay the same over the years"
    (search.private / "trials.jsonl").write_text(
        json.dumps({name: value for name, value in search._records[0].items() if name != "data"}) + "\n"
    )
    with pytest.raises(InputError, match="are not those"):
        begin(search.root)


def test_code_that_the_space_names_is_part_of_what_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "schedules_of_mine.py"
    module.write_text("def one(steps): return lambda step: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = question({"optimizer.schedule": ["constant", "schedules_of_mine:one"]})
    before = asked.to_record()
    assert before == asked.to_record()
    assert before["code_of_values"].keys() == {"schedules_of_mine:one"}
    module.write_text("def one(steps): return lambda step: 0.2\n")
    after = asked.to_record()
    assert [name for name in after if after[name] != before[name]] == ["code_of_values"]


@pytest.mark.parametrize("gone", ["secret.key", "trials.jsonl"])
def test_without_its_private_part_a_search_does_not_go_on(search: Search, gone: str) -> None:
    (search.private / gone).unlink()
    with pytest.raises(InputError, match="must not be drawn again"):
        begin(search.root)


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        open_directory(tmp_path)
    assert not (tmp_path / "private").exists()


def test_what_is_private_is_for_the_owner_alone_and_nothing_public_tells_of_it(search: Search) -> None:
    search.begin(search.trials[0])
    assert stat.S_IMODE(search.private.stat().st_mode) == 0o700
    files = [path for path in search.private.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert json.loads(search.description.read_text()).keys() == {
        *(
            "format",
            "settings",
            "space",
            "law",
            "metric",
            "dataset_size",
            "code",
            "code_of_values",
            "environment",
            "terms",
        )
    }


# Trials that are lost, and the best.


def test_a_trial_that_was_deleted_has_failed_and_is_not_run_anew(search: Search, exported: list[Path]) -> None:
    for trial, accuracy in zip(search.trials, (0.9, *[0.5] * search.number), strict=False):
        train(search, trial, accuracy)
    shutil.rmtree(search.trials[0].run.root)
    again = begin(search.root)
    assert again.left() == []
    best.release(again)
    assert exported == [search.trials[1].run.root]


def test_a_trial_is_lost_with_its_ledger(search: Search) -> None:
    trial = search.trials[0]
    train(search, trial, 0.9)
    for name in ("ledger.jsonl", "summary.json", "config.yaml"):
        (trial.run.root / name).unlink()
    again = begin(search.root)
    assert trial.name not in {left.name for left in again.left()}
    assert again.failed(again.trials[0])


def test_a_trial_that_was_killed_before_its_first_step_goes_on(search: Search) -> None:
    search.begin(search.trials[0])
    secret = search.trials[0].run.secret.read_bytes()
    again = begin(search.root)
    assert again.left() == again.trials
    again.begin(again.trials[0])
    assert again.trials[0].run.secret.read_bytes() == secret


def test_a_trial_that_fails_again_and_again_counts_as_the_worst(search: Search) -> None:
    trial = search.trials[1]
    search.begin(trial)
    for _ in range(ATTEMPTS):
        assert not search.over(trial)
        search.note_failure(trial, "exit code 1")
    again = begin(search.root)
    assert again.over(again.trials[1])
    assert again.failed(again.trials[1])


def test_the_best_of_what_ended_well_is_released_with_the_epsilon_of_the_search(
    search: Search, exported: list[Path]
) -> None:
    results: list[dict[str, Any]] = [
        {"accuracy": 0.99, "guarantee": "void: parameters are not finite"},
        {"accuracy": 0.5},
        {"accuracy": 0.5},
        {"accuracy": 0.4},
        {"accuracy": 0.99, "sigma": 0.9},
        {"accuracy": math.nan},
        {"accuracy": 0.99, "guarantee": "holds"},
        {"accuracy": 0.99, "mark": "it is no trial"},
        {"accuracy": 0.99, "data": DATA | {"training data": b"other"}},
        {"accuracy": 0.99, "data": DATA | {"test data": b"other"}},
    ]
    for trial, result in zip(search.trials, results, strict=True):
        train(search, trial, **result)
    summary = best.release(search)
    assert exported == [search.trials[1].run.root], "the first of two that are as good"
    assert summary == json.loads(search.summary.read_text())
    assert summary["epsilon"] == search.terms.epsilon
    assert summary["expected_trials"] == 4.0
    assert summary["best"]["settings"] == search.trials[1].settings
    assert summary["best"]["metrics"] == {"accuracy": 0.5}
    told = search.summary.read_text() + search.description.read_text()
    assert not [trial.name for trial in search.trials if trial.name in told]
    assert "number" not in summary


def test_a_trial_that_was_charged_for_more_than_its_plan_is_not_released(search: Search) -> None:
    trial = search.trials[0]
    train(search, trial, 0.9)
    assert best.result_of(search, trial) is not None
    ledger = Ledger(trial.run.ledger)
    first = ledger.plans[0].to_record()
    changed = first | {"incarnation": 1, "start": 8, "nonce": "ab" * 32, "reasons": [TRIAL, "a setting changed"]}
    ledger.begin(Plan.from_record(changed))
    ledger.reserve(8, 16)
    assert best.result_of(search, trial) is None


def test_a_copied_trial_is_not_released(search: Search) -> None:
    trial = search.trials[0]
    train(search, trial, 0.9)
    ledger = trial.run.ledger.read_bytes()
    trial.run.ledger.rename(trial.run.root / "moved")
    trial.run.ledger.write_bytes(ledger)
    assert best.result_of(search, trial) is None


def test_where_every_trial_failed_nothing_is_released(search: Search, exported: list[Path]) -> None:
    for trial in search.trials:
        train(search, trial, None)
    summary = best.release(search)
    assert (summary["status"], summary["best"], exported) == ("nothing to release", None, [])
    assert summary["epsilon"] == search.terms.epsilon


def test_a_release_that_was_killed_is_made_again(search: Search, exported: list[Path]) -> None:
    for trial in search.trials:
        train(search, trial, 0.5)
    first = best.release(search)
    search.summary.unlink()
    (search.root / ".best.x1").mkdir()
    assert best.release(begin(search.root)) == first
    assert not (search.root / ".best.x1").exists()


def test_candidates_of_other_batches_get_the_noise_that_keeps_them_within_the_bound(tmp_path: Path) -> None:
    axes = {"sampling.expected_batch_size": [32, 64, 128], "training.steps": [8, 16, 40]}
    asked = question(axes, law=Law(30.0, math.inf))
    found = begin(tmp_path / "s", asked)
    plans = [trial.plan for trial in found.trials if trial.plan is not None]
    assert len({plan.noise_multiplier for plan in plans}) > 3
    whole = np.max([trial_divergences(plan) for plan in [*plans, found.terms.trial]], axis=0)
    assert search_cost(whole, asked.law, 1e-4).epsilon <= found.terms.epsilon * (1 + 1e-12)
    for trial in found.trials:
        assert trial.config is not None
        assert trial.plan is not None
        assert trial.config.privacy.target_epsilon is None
        assert trial.config.privacy.noise_multiplier == trial.plan.noise_multiplier
        assert trial.config.sampling.expected_batch_size == trial.settings["sampling.expected_batch_size"]
