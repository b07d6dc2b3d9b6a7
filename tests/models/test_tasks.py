"""Tasks: losses and metrics against other implementations of them, and the shapes and columns that they refuse."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dpdist import config
from dpdist.errors import InputError
from dpdist.models import Task, build, example_loss
from dpdist.models.scores import auroc, r2
from dpdist.models.tasks import TASKS, next_token_loss, own_metrics, task_of

DRAW = np.random.default_rng(0)


def shape(*axes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, np.dtype(dtype))


def measured(name: str, outputs: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a task, of outputs [n, ...]."""
    task = TASKS[name]
    found = jax.vmap(task.statistics)(jnp.asarray(outputs), {k: jnp.asarray(v) for k, v in columns.items()})
    return dict(task.metrics({k: np.asarray(v, np.float64) for k, v in found.items()}))


@pytest.mark.parametrize("levels", [3, 1000])  # with many ties, and with few
def test_auroc_is_scikit_learns(levels: int) -> None:
    scores, positive = DRAW.integers(0, levels, 500) / 7, DRAW.random(500) < 0.3
    assert auroc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_auroc_without_pairs_or_with_nan_is_not_defined() -> None:
    assert math.isnan(auroc(np.ones(3), np.ones(3, bool)))
    assert math.isnan(auroc(np.array([0.1, np.nan]), np.array([True, False])))


def test_r2_is_scikit_learns_and_not_defined_for_a_constant() -> None:
    target, predicted = DRAW.standard_normal((50, 3)), DRAW.standard_normal((50, 3))
    assert r2(predicted, target) == pytest.approx(sklearn_metrics.r2_score(target, predicted), abs=1e-12)
    assert math.isnan(r2(predicted, np.ones((50, 3))))


def test_classification_counts_and_two_classes_have_an_auroc() -> None:
    logits, label = DRAW.standard_normal((90, 4)).astype(np.float32), DRAW.integers(0, 4, 90)
    assert measured("classification", logits, {"label": label}) == {"accuracy": np.mean(logits.argmax(1) == label)}
    label = label % 2
    found = measured("classification", logits[:, :2], {"label": label})
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(label, logits[:, 1] - logits[:, 0]), abs=1e-12)


@pytest.mark.parametrize("axes", [(), (1,)])
def test_binary_measures_one_logit(axes: tuple[int, ...]) -> None:
    logit, label = DRAW.standard_normal((90, *axes)).astype(np.float32), DRAW.integers(0, 2, 90)
    found = measured("binary", logit, {"label": label})
    assert found["accuracy"] == np.mean((logit.reshape(-1) > 0) == label)
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(label, logit.reshape(-1)), abs=1e-12)
    loss = jax.vmap(TASKS["binary"].loss)(jnp.asarray(logit), {"label": jnp.asarray(label)})  # type: ignore[arg-type]
    expected = sklearn_metrics.log_loss(label, 1 / (1 + np.exp(-logit.reshape(-1).astype(float))))
    assert np.mean(np.asarray(loss)) == pytest.approx(expected, rel=1e-5)


def test_multilabel_is_the_mean_over_the_labels_that_have_both_values() -> None:
    logits, label = DRAW.standard_normal((90, 3)).astype(np.float32), DRAW.random((90, 3)) < 0.4
    label[:, 2] = False
    found = measured("multilabel", logits, {"label": label})
    areas = [sklearn_metrics.roc_auc_score(label[:, i], logits[:, i]) for i in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert found["accuracy"] == np.mean((logits > 0) == label)


def test_regression_is_scikit_learns() -> None:
    predicted, target = DRAW.standard_normal((2, 80, 2)).astype(np.float32)
    found = measured("regression", predicted, {"target": target})
    assert found["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(target, predicted), rel=1e-6)
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(target, predicted), rel=1e-6)
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(target, predicted), rel=1e-5)


def test_perplexity_counts_tokens_and_not_examples_and_leaves_padding_out() -> None:
    logits, tokens = DRAW.standard_normal((6, 5, 7)).astype(np.float32), DRAW.integers(0, 7, (6, 5))
    mask = (np.arange(5) < DRAW.integers(2, 6, 6)[:, None]).astype(np.int32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = [
        (log_p[n, t, tokens[n, t + 1]], logits[n, t].argmax() == tokens[n, t + 1])
        for n in range(6)
        for t in range(4)
        if mask[n, t + 1]
    ]
    found = measured("language_modeling", logits, {"input_ids": tokens, "attention_mask": mask})
    assert found["perplexity"] == pytest.approx(np.exp(-np.mean([p for p, _ in terms])), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean([right for _, right in terms]))
    # What stands in the padding does not matter, to the metrics or to the loss.
    other = np.where(mask == 1, tokens, 3)
    assert measured("language_modeling", logits, {"input_ids": other, "attention_mask": mask}) == found
    one = {"input_ids": jnp.asarray(tokens[0]), "attention_mask": jnp.zeros(5, jnp.int32)}
    assert float(next_token_loss(jnp.asarray(logits[0]), one)) == 0  # nothing but padding
    one["attention_mask"] = jnp.asarray(mask[0])
    n = int(mask[0].sum()) - 1
    assert float(next_token_loss(jnp.asarray(logits[0]), one)) == pytest.approx(
        -np.mean([p for p, _ in terms[:n]]), 1e-5
    )


LABEL, IMAGE = shape(), shape(2, dtype=np.float32)
FOUR, ONE = shape(4, dtype=np.float32), shape(dtype=np.float32)
#: Task, columns of an example beside the image, outputs, what the error blames and says.
REFUSED: dict[str, tuple[str, dict[str, Any], Any, str, str]] = {
    "one logit": ("classification", {"label": LABEL}, ONE, "model.task", "model.task=binary"),
    "one logit in a row": ("classification", {"label": LABEL}, shape(1), "model.task", "a softmax of one is always 1"),
    "a logit a token": ("classification", {"label": LABEL}, shape(5, 9), "model.task", "language_modeling"),
    "no label": ("classification", {}, FOUR, "columns image", "data.columns={label: ITS_NAME}"),
    "(n, 1) labels": ("classification", {"label": shape(1)}, FOUR, "'label': int32[1]", "labels[:, 0]"),
    "one-hot labels": ("classification", {"label": shape(4)}, FOUR, "'label': int32[4]", "argmax"),
    "quantities": ("classification", {"label": ONE}, FOUR, "'label': float32[]", "model.task=regression"),
    "bools": ("classification", {"label": shape(dtype=bool)}, FOUR, "'label': bool[]", "convert them"),
    "two outputs": ("binary", {"label": LABEL}, shape(2), "model.task", "one output for each example, not [2]"),
    "two labels": ("binary", {"label": shape(2)}, ONE, "'label': int32[2]", "0 or 1"),
    "probabilities": ("binary", {"label": ONE}, ONE, "'label': float32[]", "an integer or a bool"),
    "too few labels": ("multilabel", {"label": shape(3)}, FOUR, "model.task", "[4] and the label is [3]"),
    "one class": ("multilabel", {"label": LABEL}, FOUR, "'label': int32[]", "of shape [classes]"),
    "no target": ("regression", {"label": LABEL}, ONE, "columns image, label", "data.columns={target: ITS_NAME}"),
    "two targets": ("regression", {"target": shape(2)}, ONE, "'target': int32[2]", "as many as the model has outputs"),
    "no tokens": ("language_modeling", {"text": shape(8)}, shape(8, 9), "columns image, text", "'input_ids'"),
    "one token": ("language_modeling", {"input_ids": shape(1)}, shape(1, 9), "int32[1]", "length 2 or more"),
    "tokens of no kind": ("language_modeling", {"input_ids": IMAGE}, shape(2, 9), "float32[2]", "integers of shape"),
    "a classifier": ("language_modeling", {"input_ids": shape(8)}, shape(4), "model.task", "task=classification"),
    "a short mask": (
        "language_modeling",
        {"input_ids": shape(8), "attention_mask": shape(7)},
        shape(8, 9),
        "'attention_mask': int32[7]",
        "the shape of 'input_ids', [8]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_remedy(case: str) -> None:
    name, columns, outputs, value, remedy = REFUSED[case]
    with pytest.raises(InputError) as caught:
        TASKS[name].check({"image": IMAGE} | columns, outputs, "train")
    assert value in f"{caught.value.field} {caught.value.value}"
    assert remedy in caught.value.remedy


def test_what_makes_sense_passes_and_names_the_integers_to_check() -> None:
    assert TASKS["classification"].check({"label": LABEL}, FOUR, "train") == {"label": 4}
    assert TASKS["binary"].check({"label": shape(dtype=bool)}, shape(1), "train") == {"label": 2}
    assert TASKS["multilabel"].check({"label": shape(4)}, FOUR, "train") == {"label": 2}
    assert TASKS["regression"].check({"target": ONE}, shape(1), "train") == {}
    assert TASKS["language_modeling"].check({"input_ids": shape(8)}, shape(8, 9), "train") == {"input_ids": 9}
    assert TASKS["none"].check({}, FOUR, "train") == {}


@pytest.mark.parametrize(
    ("task", "columns", "outputs"),
    [
        ("binary", {"label": LABEL}, 1),
        ("regression", {"target": shape(3, dtype=np.float32)}, 3),
        ("multilabel", {"label": shape(5)}, 5),
        ("classification", {"label": LABEL}, 4),
    ],
)
def test_a_built_in_model_gets_as_many_outputs_as_the_task_needs(
    task: str, columns: dict[str, Any], outputs: int
) -> None:
    model = build(config.Model(name="mlp", task=task), example={"image": IMAGE} | columns, classes=4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    example = {"image": IMAGE} | columns
    found = jax.eval_shape(model.apply, params, example)
    assert found.shape == (outputs,)
    TASKS[task].check(example, found, "train")
    assert jax.eval_shape(example_loss(model), params, example).shape == ()


def test_a_missing_column_is_named_before_the_models_outputs_are_counted() -> None:
    for task, column in (("regression", "target"), ("multilabel", "label")):
        with pytest.raises(InputError, match=f"columns image.*in a column '{column}'; add a column named"):
            build(config.Model(name="mlp", task=task), example={"image": IMAGE}, classes=None)


def test_a_task_that_is_none_is_told_apart_from_one_that_is_not_there() -> None:
    with pytest.raises(InputError, match="regression"):
        task_of(config.Model(task="regresion"))
    with pytest.raises(InputError, match=r"model\.classes.*what regression predicts is counted by the data"):
        task_of(config.Model(task="regression", classes=3))
    with pytest.raises(InputError, match=r"model\.loss = None: the task none has none"):
        build(config.Model(name="mlp", task="none"), example={"image": IMAGE}, classes=4)


@pytest.mark.parametrize("name", ["classification", "binary", "multilabel", "regression", "language_modeling"])
def test_a_model_that_gives_nan_has_no_metric(name: str) -> None:
    wide = {"multilabel": (9, 3), "classification": (9, 3), "language_modeling": (9, 4, 7)}.get(name, (9,))
    label = np.ones((9, 3) if name == "multilabel" else 9, np.int32)
    columns = {"label": label, "target": np.ones(9, np.float32), "input_ids": np.ones((9, 4), np.int32)}
    found = measured(name, np.full(wide, np.nan, np.float32), columns)
    assert not any(math.isfinite(value) for value in found.values()), found


def test_many_numbers_to_predict_are_not_kept_for_r2() -> None:
    predicted, target = DRAW.standard_normal((2, 20, 65)).astype(np.float32)
    found = measured("regression", predicted, {"target": target})
    assert found.keys() == {"mse", "mae"}
    assert found["mse"] == pytest.approx(np.square(predicted - target).mean(), rel=1e-6)


def test_a_loss_is_computed_in_float32_whatever_the_model_computes_in() -> None:
    outputs = jnp.asarray([300.0], jnp.bfloat16)
    assert float(TASKS["regression"].loss(outputs, {"target": jnp.float32(301)})) == 1.0  # type: ignore[misc]


def test_tasks_and_metrics_of_the_users_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task.py").write_text(
        "from dpdist.models import Task\n"
        "ranking = Task(name='ranking', loss=lambda outputs, example: outputs.sum(), primary='top')\n"
        "wrong = 3\n"
        "def margin(outputs, example):\n    return outputs.max()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = task_of(config.Model(task="own_task:ranking"))
    assert isinstance(own, Task)
    assert own.primary == "top"
    assert own.check({}, FOUR, "train") == {}
    with pytest.raises(InputError, match=r"must be a dpdist\.models\.tasks\.Task, not int"):
        task_of(config.Model(task="own_task:wrong"))
    assert list(own_metrics(config.Model(metrics={"margin": "own_task:margin"}))) == ["margin"]
    for taken in ("epsilon", "loss", "accuracy"):
        with pytest.raises(InputError, match=rf"model\.metrics\.{taken}.*rename it"):
            own_metrics(config.Model(metrics={taken: "own_task:margin"}))
