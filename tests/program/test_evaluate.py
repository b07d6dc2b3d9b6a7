"""Test metrics are those of NumPy over all test examples, however many devices share them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dpdist.data import ArraySource
from dpdist.errors import InputError
from dpdist.models import Model
from dpdist.models.tasks import TASKS, Task
from dpdist.program import evaluate
from dpdist.program.evaluate import Evaluator

DRAW = np.random.default_rng(3)
X = DRAW.standard_normal((203, 4)).astype(np.float32)
W = {"w": DRAW.standard_normal((4, 3)).astype(np.float32)}
COLUMNS = {"x": X, "label": DRAW.integers(0, 3, 203).astype(np.int32)}


def apply(params: Any, example: Any) -> Any:
    return example["x"] @ params["w"]


def evaluator(devices: int, batch: int, *, task: str = "classification", columns: Any = COLUMNS, **options: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    chosen = options.pop("of", TASKS[task])
    model = Model(init=lambda key: W, apply=apply, loss=options.pop("loss", chosen.loss))
    own = options.pop("own", {})
    source = ArraySource(columns)
    return Evaluator(model, chosen, own, W, source, mesh, batch_size=batch, workers=1, **options)


@pytest.mark.parametrize(("devices", "batch"), [(1, 203), (1, 16), (3, 16), (8, 5), (8, 500)])
def test_metrics_are_those_of_all_examples_in_order_on_any_devices(devices: int, batch: int) -> None:
    own = {"first": lambda outputs, example: outputs[0], "weighted": lambda outputs, example: example["x"][0] * 2}
    chosen = evaluator(devices, batch, own=own)
    found = chosen.measure(W)
    chosen.close()
    logits = X @ W["w"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert list(found) == ["accuracy", "first", "weighted", "loss"]
    assert found["accuracy"] == np.mean(logits.argmax(1) == COLUMNS["label"])
    assert found["loss"] == pytest.approx(-log_p[np.arange(203), COLUMNS["label"]].mean(), rel=1e-6)
    assert found["first"] == pytest.approx(logits[:, 0].mean(), rel=1e-5)
    assert found["weighted"] == pytest.approx(2 * X[:, 0].mean(), rel=1e-5)


def test_a_metric_of_whole_arrays_sees_every_example_once() -> None:
    columns = {"x": X, "target": DRAW.standard_normal((203, 3)).astype(np.float32)}
    found = {n: evaluator(n, 7, task="regression", columns=columns).measure(W) for n in (1, 8)}
    errors = X @ W["w"] - columns["target"]
    for metrics in found.values():
        assert metrics["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-6)
        assert next(iter(metrics)) == "mse"
    assert found[1] == pytest.approx(found[8], rel=1e-6)


def test_large_outputs_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluator(2, 64).measure(W)
    whole = evaluator(2, 64)._measure.memory_analysis().temp_size_in_bytes
    monkeypatch.setattr(evaluate, "_OUTPUTS", 5 * 3 * 4)  # five examples' logits; 64 are no multiple of it
    few = evaluator(2, 64)
    assert few.measure(W) == pytest.approx(expected, rel=1e-6)
    assert "while" in few._measure.as_text()
    assert few._measure.memory_analysis().temp_size_in_bytes != whole


def test_what_is_not_finite_is_none_and_not_a_number() -> None:
    found = evaluator(2, 16).measure({"w": W["w"] * np.nan})
    assert found == {"accuracy": None, "loss": None}


def test_a_task_of_the_users_own_cannot_rename_the_step() -> None:
    own = Task(name="own", metrics=lambda statistics: {"step": 3.0})
    with pytest.raises(InputError, match="gives a metric the name step"):
        evaluator(1, 64, of=own, loss=TASKS["classification"].loss)


def test_a_loss_that_is_random_in_training_has_no_value_here() -> None:
    def dropped(outputs: Any, example: Any) -> Any:
        return jnp.sum(outputs * jax.random.bernoulli(example["key"], 0.5, outputs.shape))

    assert list(evaluator(1, 64, loss=dropped).measure(W)) == ["accuracy"]
    with pytest.raises(InputError, match=r"KeyError in .*test_evaluate\.py, line \d+: 'labels'"):
        evaluator(1, 64, loss=lambda outputs, example: example["labels"])


def test_it_ends_early_where_it_is_told_to() -> None:
    answers = iter([False, True])
    assert evaluator(2, 16).measure(W, stop=lambda: next(answers)) is None
