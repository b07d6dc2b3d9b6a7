"""Tasks: what a model's outputs mean, hence its loss, its test metrics, and the shapes and values that make sense."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dpdist import config as config_module
from dpdist.config.plugins import load_function, load_object
from dpdist.errors import InputError
from dpdist.models.scores import auroc, r2

#: Arrays of one example by column, or their shapes.
Example = Mapping[str, Any]
Loss = Callable[[Array, Example], Array]


def _nothing(outputs: Array, example: Example) -> dict[str, Array]:
    return {}


def _no_metrics(statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {}


def _anything(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned. One of a user's own needs a name and a loss; the rest has defaults.

    Test metrics are exact: `statistics` of every test example, whatever the number of devices, go to `metrics`
    together. The loss is always measured beside them, as the mean over the examples.
    """

    name: str
    #: `loss(outputs, example) -> scalar` of one example; None where the model or `model.loss` brings it.
    loss: Loss | None = None
    #: The metric that progress and tables show.
    primary: str = "loss"
    #: `statistics(outputs, example)`: numbers of one test example by name, each of any fixed shape; kept as float32.
    statistics: Callable[[Array, Example], dict[str, Array]] = _nothing
    #: `metrics(statistics) -> numbers by name`, of the statistics of all n test examples: float64[n, ...] by name.
    metrics: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]] = _no_metrics
    #: `check(example, outputs, part)`: takes the shapes of one example and of the outputs, raises `InputError` where
    #: they do not fit, and returns the columns of integers from 0 with the number that each must lie below. `part` is
    #: `train` or `test`, to be named in the error.
    check: Callable[[Example, jax.ShapeDtypeStruct, str], dict[str, int]] = _anything
    #: What to do where one does not.
    out_of_range: str = "check the values."
    #: `width(example, classes)`: the number of outputs, which a model's function gets as `classes`; None is unknown.
    width: Callable[[Example, int | None], int | None] = lambda example, classes: classes


def task_of(config: config_module.Model) -> Task:
    """The task that a config's `model` section names, or the one that its model is usually trained on.

    Raises:
        InputError: there is no such task.
    """
    name = config.task or ("language_modeling" if config.name in LANGUAGE_MODELS else "classification")
    if name in TASKS:
        task = TASKS[name]
    else:
        task = load_object(name, "model.task", list(TASKS))
        if not isinstance(task, Task):
            raise InputError("model.task", name, f"must be a dpdist.models.tasks.Task, not {type(task).__name__}.")
    if config.classes is not None and task.name in ("binary", "regression", "multilabel", "language_modeling"):
        remedy = f"leave it out: what {task.name} predicts is counted by the data."
        raise InputError("model.classes", config.classes, remedy)
    return task


def own_metrics(config: config_module.Model) -> dict[str, Loss]:
    """The user's own metrics, `f(outputs, example) -> number` of one test example by name; their means are shown.

    Raises:
        InputError: there is no such function, or a metric has the name of something else in `metrics.jsonl`.
    """
    for name in config.metrics.keys() & (RESERVED | METRICS):
        raise InputError(f"model.metrics.{name}", config.metrics[name], "is the name of another number; rename it.")
    for name in config.metrics:
        if not re.fullmatch(r"\w[\w.@-]*", name):  # it becomes that of a plot's file
            raise InputError("model.metrics", name, "name metrics by letters, digits and any of _ . @ -.")
    return {name: load_function(path, f"model.metrics.{name}", []) for name, path in config.metrics.items()}


def cross_entropy(logits: Array, example: Example) -> Array:
    """Return the softmax cross entropy of one example's logits [classes] with the integer `example["label"]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


def _sigmoid_cross_entropy(outputs: Array, example: Example) -> Array:
    """Of `classes` logits, or of one, each a yes or no of its own; their mean."""
    label = example["label"].astype(jnp.float32)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs.reshape(label.shape).astype(jnp.float32), label))


def _squared_error(outputs: Array, example: Example) -> Array:
    """In float32: a bfloat16 has no 301."""
    return jnp.mean(jnp.square(outputs.astype(jnp.float32) - example["target"].reshape(outputs.shape)))


def _if_numbers(outputs: Array, value: Array) -> Array:
    """`value`, or NaN where an output is: the largest of NaNs is the first, and no NaN is above 0."""
    return jnp.where(jnp.isnan(outputs).any(), jnp.nan, value.astype(jnp.float32))


def next_token_loss(outputs: Array, example: Example) -> Array:
    """Return the mean cross entropy of the next token, over those that `example["attention_mask"]` does not leave out.

    Args:
        outputs: logits [length, vocabulary]; those at t are for the token at t + 1.
        example: `input_ids`, int[length], and perhaps `attention_mask`, int[length], 0 for padding.
    """
    losses, counted = _next_tokens(outputs, example)[:2]
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counted), 1)


def _next_tokens(outputs: Array, example: Example) -> tuple[Array, Array, Array]:
    """For each next token: its cross entropy, 1 where it counts, and 1 where it counts and has the largest logit."""
    tokens = example["input_ids"][1:]
    mask = example.get("attention_mask")
    counted = jnp.ones(tokens.shape, bool) if mask is None else (mask[1:] != 0) & (mask[:-1] != 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs[:-1], tokens)
    right = jnp.argmax(outputs[:-1], axis=-1) == tokens
    return jnp.where(counted, losses, 0.0), counted, counted & right


def _classification_statistics(outputs: Array, example: Example) -> dict[str, Array]:
    found = {"right": _if_numbers(outputs, jnp.argmax(outputs) == example["label"])}
    return found | ({"score": outputs[1] - outputs[0], "label": example["label"]} if outputs.size == 2 else {})


def _classification_metrics(statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    found = {"accuracy": float(np.mean(statistics["right"]))}
    return found | ({"auroc": auroc(statistics["score"], statistics["label"] > 0)} if "score" in statistics else {})


def _logit_statistics(outputs: Array, example: Example) -> dict[str, Array]:
    return {"score": outputs.reshape(-1), "label": example["label"].reshape(-1)}


def _logit_metrics(statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy over all labels, and the mean of the labels' AUROC, of those that have both values."""
    scores, labels = statistics["score"], statistics["label"] > 0
    areas = [auroc(score, label) for score, label in zip(scores.T, labels.T, strict=True)]
    known = [area for area in areas if not math.isnan(area)]
    right = np.where(np.isnan(scores), np.nan, (scores > 0) == labels)
    return {"accuracy": float(np.mean(right)), "auroc": float(np.mean(known)) if known else math.nan}


def _regression_statistics(outputs: Array, example: Example) -> dict[str, Array]:
    predicted, target = outputs.reshape(-1).astype(jnp.float32), example["target"].reshape(-1).astype(jnp.float32)
    errors = predicted - target
    found = {"squared": jnp.mean(jnp.square(errors)), "absolute": jnp.mean(jnp.abs(errors))}
    return found | ({"predicted": predicted, "target": target} if target.size <= _FEW_OUTPUTS else {})


def _regression_metrics(statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    found = {"mse": float(np.mean(statistics["squared"])), "mae": float(np.mean(statistics["absolute"]))}
    if "predicted" not in statistics:
        return found
    return found | {"r2": r2(statistics["predicted"], statistics["target"])}


def _token_statistics(outputs: Array, example: Example) -> dict[str, Array]:
    losses, counted, right = _next_tokens(outputs, example)
    return {"loss": jnp.sum(losses), "tokens": jnp.sum(counted), "right": _if_numbers(losses, jnp.sum(right))}


def _token_metrics(statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
    tokens = max(1.0, float(statistics["tokens"].sum()))
    mean = float(statistics["loss"].sum()) / tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "token_accuracy": float(statistics["right"].sum()) / tokens,
    }


def _check_classification(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    if math.prod(outputs.shape) == 1:
        raise InputError(
            "model.task",
            "classification",
            "the model has one output an example, and a softmax of one is always 1: set model.task=binary (or "
            "regression), or give the model one output a class.",
        )
    if len(outputs.shape) != 1:
        raise InputError(
            "model.task",
            "classification",
            f"it needs outputs of shape [classes] for each example, not {_shape(outputs)}; for a language model set "
            "model.task=language_modeling.",
        )
    needs = f"each {part} example needs one integer class as its label"
    label = _column(example, "label", needs)
    if label.shape != () or label.dtype.kind not in "iu":
        raise InputError("data.source", _described("label", label), f"{needs}, of shape []; {_classes_of(label)}.")
    return {"label": outputs.shape[0]}


def _check_binary(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    if math.prod(outputs.shape) != 1:
        raise InputError(
            "model.task",
            "binary",
            f"it needs one output for each example, not {_shape(outputs)}; for one output a class set "
            "model.task=classification, for several labels at once multilabel.",
        )
    needs = f"each {part} example needs one label, 0 or 1"
    label = _column(example, "label", needs)
    if math.prod(label.shape) != 1 or label.dtype.kind not in "iub":
        raise InputError("data.source", _described("label", label), f"{needs}, an integer or a bool of shape [].")
    return {"label": 2}


def _check_multilabel(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    needs = f"each {part} example needs a label of shape [classes], of integers 0 and 1 or bools"
    label = _column(example, "label", needs)
    if len(label.shape) != 1 or label.dtype.kind not in "iub":
        raise InputError("data.source", _described("label", label), f"{needs}.")
    if outputs.shape != label.shape:
        remedy = f"the model gives {_shape(outputs)} and the label is {_shape(label)}; they must have one shape."
        raise InputError("model.task", "multilabel", remedy)
    return {"label": 2}


def _check_regression(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    needs = f"each {part} example needs the number (or numbers) to predict in a column 'target'"
    target = _column(example, "target", needs)
    if target.dtype.kind not in "iuf" or math.prod(target.shape) != math.prod(outputs.shape):
        remedy = f"{needs}, as many as the model has outputs, {_shape(outputs)}."
        raise InputError("data.source", _described("target", target), remedy)
    return {}


def _check_language_modeling(example: Example, outputs: jax.ShapeDtypeStruct, part: str) -> dict[str, int]:
    needs = f"each {part} example needs token ids in a column 'input_ids', integers of shape [length], length 2 or more"
    tokens = _column(example, "input_ids", needs)
    if len(tokens.shape) != 1 or tokens.shape[0] < 2 or tokens.dtype.kind not in "iu":
        raise InputError("data.source", _described("input_ids", tokens), f"{needs}.")
    if len(outputs.shape) != 2 or outputs.shape[0] != tokens.shape[0]:
        raise InputError(
            "model.task",
            "language_modeling",
            f"it needs outputs of shape [{tokens.shape[0]}, vocabulary] for each example, not {_shape(outputs)}; a "
            "model that gives one output a class is trained with model.task=classification.",
        )
    mask = example.get("attention_mask")
    if mask is not None and mask.shape != tokens.shape:
        remedy = f"it needs the shape of 'input_ids', {_shape(tokens)}."
        raise InputError("data.source", _described("attention_mask", mask), remedy)
    return {"input_ids": outputs.shape[1]}


def _column(example: Example, name: str, needs: str) -> Any:
    if name not in example:
        remedy = f"{needs}; add a column named '{name}', or name the one that is it: data.columns={{{name}: ITS_NAME}}."
        raise InputError("data.source", f"columns {', '.join(sorted(example))}", remedy)
    return example[name]


def _described(name: str, value: Any) -> str:
    return f"column {name!r}: {value.dtype.name}{_shape(value)} an example"


def _shape(value: Any) -> str:
    return f"[{','.join(map(str, value.shape))}]"


def _classes_of(label: Any) -> str:
    """What makes classes of labels of this shape."""
    if label.shape == ():
        return "convert them, or, if they are quantities to predict, set model.task=regression"
    if label.shape == (1,):
        return "drop the last axis (labels[:, 0])"
    return "take labels.argmax(-1) of one-hot rows, or, if an example may have several, set model.task=multilabel"


def _one(example: Example, classes: int | None) -> int:
    return 1


def _as_many_as(column: str, what: str) -> Callable[[Example, int | None], int | None]:
    def width(example: Example, classes: int | None) -> int | None:
        return math.prod(_column(example, column, f"each example needs {what} in a column '{column}'").shape)

    return width


#: Numbers of an example for which R2 is measured, which needs all of them of all examples.
_FEW_OUTPUTS = 64
#: Models that give one output a token.
LANGUAGE_MODELS = ("gpt2", "llama")
#: What records of `metrics.jsonl` hold beside metrics.
RESERVED = frozenset({"step", "epsilon", "incarnation", "examples_per_second", "seconds", "seconds_to_first_step"})
#: Metrics that the tasks here have.
METRICS = frozenset({"loss", "accuracy", "auroc", "mse", "mae", "r2", "perplexity", "token_accuracy"})

TASKS = {
    task.name: task
    for task in (
        Task(
            name="classification",
            loss=cross_entropy,
            primary="accuracy",
            statistics=_classification_statistics,
            metrics=_classification_metrics,
            check=_check_classification,
            out_of_range="set model.classes to the number of classes of the task, and number them from 0.",
        ),
        Task(
            name="binary",
            loss=_sigmoid_cross_entropy,
            primary="accuracy",
            statistics=_logit_statistics,
            metrics=_logit_metrics,
            check=_check_binary,
            out_of_range="give 0 for no and 1 for yes.",
            width=_one,
        ),
        Task(
            name="regression",
            loss=_squared_error,
            primary="mse",
            statistics=_regression_statistics,
            metrics=_regression_metrics,
            check=_check_regression,
            width=_as_many_as("target", "the number (or numbers) to predict"),
        ),
        Task(
            name="multilabel",
            loss=_sigmoid_cross_entropy,
            primary="auroc",
            statistics=_logit_statistics,
            metrics=_logit_metrics,
            check=_check_multilabel,
            out_of_range="give 0 for no and 1 for yes.",
            width=_as_many_as("label", "one 0 or 1 a class"),
        ),
        Task(
            name="language_modeling",
            loss=next_token_loss,
            primary="perplexity",
            statistics=_token_statistics,
            metrics=_token_metrics,
            check=_check_language_modeling,
            out_of_range="the model has no embedding for such a token: use the tokenizer that belongs to it, or set "
            "the vocabulary in model.options.",
        ),
        Task(name="none"),
    )
}
