"""Slips in a model, a loss or a metric of the user's own are told in one line, before anything is trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import alone

from dpdist.config import Config, from_dict
from dpdist.data import ArraySource, Dataset
from dpdist.errors import InputError
from dpdist.program.build import open_model
from dpdist.program.gradients import strategies_for

SOURCE = """
import jax.numpy as jnp
from flax import nnx
from dpdist.models import Model
from dpdist.models.nnx_model import from_nnx


def flat(example):
    return example["image"].reshape(-1)


class Net(nnx.Module):
    def __init__(self, classes, rngs):
        self.layer = nnx.Linear(4, classes, rngs=rngs)


def narrow(classes):
    return from_nnx(lambda rngs: nnx.Linear(3, classes, rngs=rngs), flat)


def normed(classes):
    return from_nnx(lambda rngs: nnx.Sequential(nnx.BatchNorm(4, rngs=rngs)), flat)


def numbered(classes):
    return Model(init=lambda key: {"w": 3}, apply=lambda params, example: jnp.zeros(classes))


def twice(classes):
    return Model(init=lambda key: jnp.zeros((4, classes)), apply=lambda w, example: (flat(example) @ w, 1))


def good(classes):
    return Model(init=lambda key: jnp.zeros((4, classes)), apply=lambda w, example: flat(example) @ w)


class Around(nnx.Module):  # a layer, and only its kernel is used
    def __init__(self, classes, rngs):
        self.layer, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x @ self.layer.kernel[...])


def around(classes):
    return from_nnx(lambda rngs: Around(classes, rngs), flat)


def bare(example, weight): ...


def text(outputs, example):
    return "a loss"


def unary(outputs):
    return outputs.sum()
"""
ROWS = {"image": np.zeros((6, 2, 2), np.float32), "label": np.arange(6, dtype=np.int32) % 2}
_NUMBER = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"slips_{next(_NUMBER)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config_of(model: dict[str, Any]) -> Config:
    return from_dict({"model": model | {"classes": 2}, "privacy": {"enabled": False}, "training": {"steps": 1}})


@pytest.mark.parametrize(
    ("model", "loss", "words"),
    [
        ("Net", None, "model.name = '{}:Net': is a class; name a function"),
        ("narrow", None, "as one example was traced: dot_general requires contracting dimensions to have the same"),
        ("normed", None, "model.name = 'BatchStat': the module holds batch statistics"),
        ("numbered", None, "model.name = '{}:numbered': init gave a int for w; give arrays"),
        ("twice", None, "model.name = '{}:twice': apply gave a tuple; the task classification takes one array"),
        ("bare", None, "model.name = '{}:bare': TypeError: bare() missing 1 required positional argument: 'weight'"),
        ("good", "text", "model.loss = '{}:text': TypeError as one example was traced: function"),
        ("good", "unary", "model.loss = '{}:unary': TypeError: unary() takes 1 positional argument but 2 were given"),
    ],
)
def test_a_slip_is_told_in_the_open(module: str, model: str, loss: str | None, words: str) -> None:
    config = config_of({"name": f"{module}:{model}"} | ({} if loss is None else {"loss": f"{module}:{loss}"}))
    with pytest.raises(InputError) as caught:
        open_model(config, Dataset(train=ArraySource(ROWS), name="rows"))
    assert words.format(module) in str(caught.value)


def test_an_adapter_beside_a_layer_that_is_not_called_is_refused(module: str) -> None:
    def choose(targets: list[str]) -> None:
        config = config_of({"name": f"{module}:around", "lora": {"rank": 1, "targets": targets}})
        loss = open_model(config, Dataset(train=ArraySource(ROWS), name="rows")).loss
        strategies_for(config, loss, alone(1))

    choose(["head/kernel"])
    with pytest.raises(InputError, match="has an adapter that would learn noise alone") as caught:
        choose(["*kernel"])
    assert (caught.value.field, caught.value.value) == ("model.lora.targets", "layer/kernel")
