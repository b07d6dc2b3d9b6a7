"""What `dpdist tune` may be asked: a space, a law of the number of trials, a metric, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import begin, question

from dpdist import config as config_module
from dpdist.errors import InputError
from dpdist.joint.selection import search_cost, trial_divergences
from dpdist.mechanism.composition import Phase
from dpdist.mechanism.keys import Secret
from dpdist_launch.cli import main
from dpdist_launch.tune.metric import Metric, choose_metric
from dpdist_launch.tune.space import Space, read_space
from dpdist_launch.tune.terms import settle


def test_candidates_are_of_the_space_independent_of_each_other_and_the_same_at_every_call() -> None:
    axes = {
        "a": [1, "two", [3]],
        "b": {"uniform": [-1.0, 1.0]},
        "c": {"log_uniform": [1e-3, 10.0]},
        "d": {"uniform": [1, 3]},
        "e": {"log_uniform": [1, 100]},
    }
    space, secret = Space(axes), Secret.fresh()
    drawn = [space.draw(secret, trial) for trial in range(3000)]
    assert drawn[7] == space.draw(secret, 7) != space.draw(Secret.fresh(), 7)
    assert {str(each["a"]) for each in drawn} == {"1", "two", "[3]"}
    assert all(type(each[name]) is int for each in drawn for name in "de")
    counts = np.bincount([each["d"] for each in drawn])[1:]
    assert counts.min() > 850, "integers of an interval are as likely as each other, the ends too"
    for name, low, high in (("b", -1, 1), ("c", 1e-3, 10), ("e", 1, 100)):
        values = np.array([each[name] for each in drawn])
        assert low <= values.min()
        assert values.max() <= high
    logs = np.log10([each["c"] for each in drawn])
    assert np.mean(logs < -1) == pytest.approx(0.5, abs=0.05)
    both = np.corrcoef([each["b"] for each in drawn], logs)[0, 1]
    next_one = np.corrcoef(logs[1:], logs[:-1])[0, 1]
    assert max(abs(both), abs(next_one)) < 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name at least one setting"),
        ("- 1", "name at least one setting"),
        ("a: [", "cannot be read as YAML"),
        ("optimizer.learning_rat: [1]", "did you mean optimizer.learning_rate"),
        ("optimizer.learning_rate: 1", "write a list of values"),
        ("optimizer.learning_rate: []", "write a list of values"),
        ("optimizer.learning_rate: {normal: [0, 1]}", "write a list of values"),
        ("optimizer.learning_rate: {uniform: [1, 0]}", "the lower one first"),
        ("optimizer.learning_rate: {uniform: [0]}", "give two numbers"),
        ("optimizer.learning_rate: {uniform: [0, .inf]}", "give two numbers"),
        ("optimizer.learning_rate: {uniform: [.nan, 1]}", "give two numbers"),
        ("optimizer.learning_rate: {uniform: [-1.0e+308, 1.7e+308]}", "none beyond 1e+308"),
        pytest.param(f"training.steps: {{uniform: [1, 1{400 * '0'}]}}", "none beyond 1e+308", id="no float"),
        ("optimizer.learning_rate: {log_uniform: [0, 1]}", "above 0"),
        ("privacy.noise_multiplier: [1, 2]", "noise follows from what all may cost"),
        ("privacy.delta: [1e-4, 1e-5]", "cannot be searched"),
        ("privacy.insecure_seed: [1, 2]", "cannot be searched"),
        ("data.split_seed: [0, 1]", "the same records"),
        ("data.options.size: [0, 1]", "the same records"),
        ("run.dir: [a, b]", "cannot be searched"),
        ("model.metrics.own: ['a:b']", "what the metric means"),
    ],
)
def test_a_space_that_cannot_be_drawn_from_or_changes_what_is_charged_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_space(file)
    assert words in str(caught.value)


def test_a_value_that_no_config_can_have_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    axes = {"optimizer.learning_rate": [0.1, -1], "privacy.clip_norm": [1.0]}
    with pytest.raises(InputError, match=r"optimizer\.learning_rate"):
        begin(tmp_path / "s", question(axes))
    assert not (tmp_path / "s/search.json").exists()
    assert not (tmp_path / "s/private/trials.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.learning_rate.x", "model.options.hidden.x", "model.options.hidden.x.y", "optimizer.name.x"]
)
def test_a_key_within_what_has_no_keys_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"--space = '{name}': (learning_rate|hidden|name) is .* has no keys"):
        begin(tmp_path / "s", question({"model.options.hidden": [[8]], name: [1]}))


def test_an_interval_as_wide_as_floats_allow_is_drawn_from_in_logarithms() -> None:
    ends = [1e-320, 1e308]
    space = Space({"a": {"log_uniform": ends}, "b": {"uniform": [-1e308, 1e308]}})
    drawn = [space.draw(Secret.fresh(), trial) for trial in range(300)]
    assert all(ends[0] <= each["a"] <= ends[1] and -1e308 <= each["b"] <= 1e308 for each in drawn)
    assert 100 < sum(each["a"] < 1e-6 for each in drawn) < 200, "half of them are below the middle of the logarithms"
    assert 100 < sum(each["b"] < 0 for each in drawn) < 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trials", "8", "--distribution", "fixed"], "the best of a known number of trials costs what releasing all"),
        (["--trials", "8", "--distribution", "geometrical"], "did you mean geometric"),
        (["--trials", "8", "--distribution", "-1"], "--distribution = '-1': the shape must be 0 to 1e+06"),
        (["--trials", "500", "--distribution", "1e18"], "--distribution = '1e18': the shape must be 0 to 1e+06"),
        (["--trials", "8", "--distribution", "nan"], "--distribution = 'nan': the shape must be 0 to 1e+06"),
        (["--trials", "0.5"], "the expected number of trials must be 1 to 500"),
        (["--trials", "1.000000000001", "--distribution", "logarithmic"], "--trials = 1.000000000001: the expected"),
        (["--trials", "8", "--at-most", "0"], "--at-most = 0"),
        (["--trials", "8", "--processes", "2", "--nodes", "2"], "not with --nodes"),
    ],
)
def test_a_search_without_a_bound_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    line = ["tune", "configs/digits.yaml", "--space", "x.yaml", "--run-dir", str(tmp_path / "s")]
    assert main([*line, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"enabled": False}, "costs nothing"),
        ({"insecure_seed": 1}, "would void the guarantee"),
        ({"target_epsilon": 1e-9}, "cannot be reached"),
        ({"noise_multiplier": 1.0}, "above privacy.target_epsilon"),
        ({"delta": 0.01}, "must be below 1/N"),
    ],
)
def test_a_search_for_which_no_guarantee_can_hold_is_refused(privacy: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        settle(question(privacy=privacy))
    assert words in str(caught.value)


def test_a_registry_of_runs_is_not_charged_with_trials(tmp_path: Path) -> None:
    """It would be charged too little where a search has a single trial."""
    asked = question()
    tree = config_module.to_dict(asked.config)
    tree["run"] |= {"registry": str(tmp_path), "registry_dataset": "people"}
    with pytest.raises(InputError, match="a search costs more than each of its trials"):
        settle(replace(asked, config=config_module.from_dict(tree)))


def test_the_target_is_that_of_the_search_and_noise_that_is_given_is_charged() -> None:
    asked = question()
    terms = settle(asked)
    assert 2.0 * (1 - 1e-3) <= terms.epsilon <= 2.0
    assert terms.epsilon == search_cost(trial_divergences(terms.trial), asked.law, 1e-4).epsilon
    assert terms.epsilon_of_one_trial < 1.2
    assert terms == settle(asked)
    given = settle(question(privacy={"target_epsilon": None, "noise_multiplier": 4.0}))
    assert given.trial == Phase(0.064, 4.0, 16)


def test_the_metric_is_that_of_the_task_unless_another_is_named() -> None:
    model = config_module.Model
    assert choose_metric(model(), maximize=None, minimize=None) == Metric("accuracy", highest=True)
    regression = model(task="regression")
    assert choose_metric(regression, maximize=None, minimize=None) == Metric("mse", highest=False)
    assert choose_metric(regression, maximize="r2", minimize=None) == Metric("r2", highest=True)
    with pytest.raises(InputError, match="regression has loss, mae, mse, r2"):
        choose_metric(regression, maximize="accuracy", minimize=None)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_scores_nothing(value: float | None) -> None:
    assert Metric("mse", highest=False).score({"mse": value}) is None
    assert Metric("mse", highest=False).score({"accuracy": 1.0}) is None
    assert Metric("mse", highest=False).score({"mse": 2.0}) == -2.0
