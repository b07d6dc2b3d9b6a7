"""Runs that predict numbers, answer yes or no, or go on with a text; and runs in which there is nothing to learn."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import userland
from jobs import EVERY, STEPS, Jobs, Run

from dpdist import load
from dpdist.data.sources import ArraySource
from dpdist.errors import InputError
from dpdist.program.gradients import ExampleLoss
from dpdist.program.probe import Probe, described, require_something_to_learn
from dpdist.run import metrics
from dpdist_launch.cli import main

WITHOUT_CLASSES = "model.classes=null"
#: Changes of the config, and the test metrics that come of it, the first being the one that is shown.
TASKS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "regression": (
        ("data.source=userland:quantities", "model.name=mlp", "model.task=regression", "model.options.scale=1"),
        ["mse", "mae", "r2", "loss"],
    ),
    "binary": (
        ("model.name=mlp", "model.task=binary", "model.options.scale=1", "data.source=userland:yes_or_no"),
        ["accuracy", "auroc", "loss"],
    ),
    "language": (
        ("data.source=userland:sentences", "model.name=userland:bigrams", "model.task=language_modeling"),
        ["perplexity", "token_accuracy", "loss"],
    ),
    "none": (
        ("model.task=none", "model.loss=userland:weighed", "model.metrics.sure=userland:confidence", "model.classes=4"),
        ["loss", "sure"],
    ),
}


@pytest.fixture(scope="module")
def trained(jobs: Jobs) -> dict[str, Run]:
    runs = {name: jobs.new(name) for name in TASKS}
    more = ("run.progress=lines", "training.steps=16", "privacy.noise_multiplier=1.0")
    started = [jobs.train(runs[name], WITHOUT_CLASSES, *changes, *more) for name, (changes, _) in TASKS.items()]
    for running, (_, names) in zip(started, TASKS.values(), strict=True):
        ended = running.wait()
        assert ended.code == 0, ended.err
        assert f"test {names[0].replace('_', ' ')} " in ended.err, ended.err
    return runs


@pytest.mark.parametrize("task", TASKS)
def test_each_task_shows_its_metrics_by_name(trained: dict[str, Run], task: str) -> None:
    run, names = trained[task], TASKS[task][1]
    summary = run.summary
    assert summary["status"] == "finished"
    assert list(summary["metrics"]) == names
    assert all(np.isfinite(value) for value in summary["metrics"].values())
    assert summary["accuracy"] == summary["metrics"].get("accuracy")
    shown = [r for r in metrics.read(run.root / "metrics.jsonl") if metrics.is_evaluation(r)]
    assert [record["step"] for record in shown] == list(range(EVERY, STEPS + 1, EVERY))
    assert metrics.metrics_of(shown[-1]) == summary["metrics"]


def test_what_is_shown_is_what_numpy_finds(trained: dict[str, Run]) -> None:
    held_out = userland.quantities()[1].take(np.arange(203))  # type: ignore[attr-defined]
    predicted = load(trained["regression"].root).predict(held_out)
    found = trained["regression"].summary["metrics"]
    assert found["mse"] == pytest.approx(np.square(predicted - held_out["target"]).mean(), rel=1e-5)
    tokens = userland.sentences()[1].take(np.arange(203))  # type: ignore[attr-defined]
    logits = load(trained["language"].root).predict(tokens)
    right = (logits.argmax(-1)[:, :-1] == tokens["input_ids"][:, 1:])[tokens["attention_mask"][:, 1:]]
    assert trained["language"].summary["metrics"]["token_accuracy"] == pytest.approx(right.mean())
    assert right.mean() > 2 / 12  # guessing gives 1/12


@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradient_norms_of_a_few_training_examples_are_private(trained: dict[str, Run], task: str) -> None:
    run = trained[task]
    looks = [json.loads(line) for line in (run.root / "private/probe.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, *range(EVERY, STEPS + 1, EVERY)]
    assert all(look["examples"] == 16 and look["not_finite"] == 0 for look in looks)
    assert all(look["norms"]["p10"] <= look["norms"]["p50"] <= look["norms"]["max"] for look in looks)
    assert (run.root / "private/probe.jsonl").stat().st_mode & 0o077 == 0


def test_diagnose_shows_them_and_says_that_no_guarantee_covers_them(
    trained: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(trained["regression"].root)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Private:")
    assert "0 of 16" in shown
    assert shown.count(".png") == 3


def test_a_run_with_nothing_to_learn_is_refused_before_its_first_step(jobs: Jobs) -> None:
    run = jobs.new("nothing")
    everything = "data.options.rows=[" + ",".join(map(str, range(1000))) + "]"
    ended = jobs.train(run, "data.source=userland:with_nans", everything).wait()
    assert ended.code == 2
    assert "the loss or the gradient of every one that was tried is NaN or infinite" in ended.err
    assert not run.ledger
    looked = json.loads((run.root / "private/probe.jsonl").read_text())
    assert (looked["not_finite"], looked["loss"]) == (16, None)


def test_a_vocabulary_that_is_not_the_models_is_refused(jobs: Jobs) -> None:
    run = jobs.new("vocabulary")
    changes = (*TASKS["language"][0], "data.options.vocabulary=13", WITHOUT_CLASSES)
    ended = jobs.train(run, *changes).wait()
    assert ended.code == 2
    assert "some values of 'input_ids' lie outside 0 to 11; the model has no embedding for such a token" in ended.err
    assert not run.ledger


def test_a_run_that_diverges_ends_with_a_reason_that_names_no_data(jobs: Jobs) -> None:
    run = jobs.new("diverging")
    ended = jobs.train(run, "optimizer.learning_rate=1e38", "privacy.clip_norm=1e6").wait()
    assert ended.code == 1
    assert "no gradient of the last 3 steps up to step" in ended.err
    assert run.summary["status"] == "failed"
    assert "trains on noise alone" in run.logs
    assert "trains on noise alone" not in ended.err


def test_labels_are_checked_under_a_loss_of_the_users_own_too(jobs: Jobs) -> None:
    run = jobs.new("own_loss")
    ended = jobs.train(run, "model.loss=userland:own_cross_entropy", "model.classes=3").wait()
    assert ended.code == 2
    assert "some values of 'label' lie outside 0 to 2" in ended.err
    assert not run.ledger


def test_few_examples_without_a_gradient_do_not_refuse_a_run() -> None:
    """One record, or one user, would decide."""
    require_something_to_learn(described(np.full(15, np.nan), np.full(15, np.nan)))
    with pytest.raises(InputError, match="16 training examples"):
        require_something_to_learn(described(np.full(16, np.nan), np.full(16, np.nan)))
    require_something_to_learn(described(np.arange(16.0), np.append(np.full(15, np.inf), 1.0)))


def test_what_clipping_on_tensor_cores_takes_off_c_is_noted_for_the_owner(
    jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shorter = jobs.new("tensor_noted"), ("privacy.clip_norm=0.01", "training.precision=tensor")
    assert jobs.train(run, *shorter).wait().code == 0
    first, *later = [json.loads(line) for line in (run.root / "private/probe.jsonl").read_text().splitlines()]
    assert 0 < first["below_clip_norm"] < 0.02
    assert not any("below_clip_norm" in look for look in later)
    assert main(["diagnose", str(run.root)]) == 0
    assert f"adds {first['below_clip_norm']:.2%} less than C" in capsys.readouterr().out
    exact = jobs.new("highest_not_noted")
    assert jobs.train(exact, "privacy.clip_norm=0.01", "training.precision=highest").wait().code == 0
    assert "below_clip_norm" not in (exact.root / "private/probe.jsonl").read_text()


def test_only_clipped_examples_are_summed_to_see_what_they_fall_short_of_c() -> None:
    """And each alone: the sum of the others would hide it."""
    source = ArraySource({"x": np.arange(32, dtype=np.float32)[:, None], "label": np.zeros(32, np.int32)})
    example = {"x": jax.ShapeDtypeStruct((1,), np.float32), "label": jax.ShapeDtypeStruct((), np.int32)}
    loss = ExampleLoss(loss_fn=lambda p, e: p["w"] * e["x"][0], params={"w": np.float32(0)}, example=example)
    probe, seen = Probe(loss, frozenset(), source, available=32), []

    def accumulate(params: Any, batch: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        assert mask.tolist() == [1, 0, 0]
        seen.append(float(batch["x"][0, 0]))
        return np.array([-4.0 * (1 - 0.001 * len(seen))])

    _, norms = probe.measure({"w": jnp.float32(0)})
    found = probe.below_clip_norm(accumulate, {}, norms, size=3, clip_norm=4.0)
    assert norms.tolist() == [2.0 * i for i in range(16)]  # every second of 32
    assert seen == [6.0, 8.0, 10.0, 12.0]
    assert found == pytest.approx(0.0025)
    assert probe.below_clip_norm(accumulate, {}, norms, size=3, clip_norm=40.0) is None
    keyed = ExampleLoss(loss_fn=loss.loss_fn, params=loss.params, example=example | {"key": jax.random.key(0)})
    randomised = Probe(keyed, frozenset(), source, available=32)  # its gradient depends on the key too
    assert randomised.below_clip_norm(accumulate, {}, norms, size=3, clip_norm=4.0) is None
