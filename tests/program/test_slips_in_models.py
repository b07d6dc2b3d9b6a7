"""Slips in a model, a loss or a metric of the user's own are told in one line, before anything is trained."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dpdist.config import from_dict
from dpdist.data import ArraySource, Dataset
from dpdist.errors import InputError
from dpdist.program.build import open_model

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


def bare(example, weight): ...


def text(outputs, example):
    return "a loss"


def unary(outputs):
    return outputs.sum()
"""
ROWS = {"image": np.zeros((6, 2, 2), np.float32), "label": np.arange(6, dtype=np.int32) % 2}
_NUMBER = itertools.count()


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
def test_a_slip_is_told_in_the_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, loss: str | None, words: str
) -> None:
    module = f"slips_{next(_NUMBER)}"
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = {"name": f"{module}:{model}", "classes": 2} | ({} if loss is None else {"loss": f"{module}:{loss}"})
    config = from_dict({"model": chosen, "privacy": {"enabled": False}, "training": {"steps": 1}})
    with pytest.raises(InputError) as caught:
        open_model(config, Dataset(train=ArraySource(ROWS), name="rows"))
    assert words.format(module) in str(caught.value)
