"""Optimizers and schedules by their path: optax's and one's own, checked before training."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpdist import config as config_module
from dpdist.config import Optimizer
from dpdist.errors import InputError
from dpdist.program.optimizer import build
from dpdist.run.fingerprints import user_code_digest

OWN = """
import jax, optax
import numpy as np

def signed(learning_rate, factor=1.0):
    return optax.chain(optax.scale(factor), optax.scale_by_learning_rate(learning_rate))

def halves(start):
    return lambda step: start * 0.5 ** step

def no_optimizer():
    return lambda grads: grads

def reading():
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: jax.pure_callback(lambda x: np.asarray(x), g, g), grads), state
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

def broken(learning_rate):
    return optax.sgdd(learning_rate)

def shrinking():
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: g[0], grads), state
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "myoptim.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path / "myoptim.py"
    sys.modules.pop("myoptim", None)


def moved(config: Optimizer, steps: int = 4) -> np.ndarray:
    """The parameter after each of some steps with the gradient 1."""
    optimizer, param, found = build(config, steps), jnp.ones(()), []
    state = optimizer.init(param)
    for _ in range(steps):
        updates, state = optimizer.update(jnp.ones(()), state, param)
        param = optax.apply_updates(param, updates)
        found.append(float(param))
    return np.array(found)


def test_an_optimizer_of_optax_does_what_optax_does() -> None:
    given = Optimizer(name="optax.lion", learning_rate=0.1, options={"b1": 0.8, "weight_decay": 0.01})
    optimizer, param = optax.lion(0.1, b1=0.8, weight_decay=0.01), jnp.ones(())
    updates, _ = optimizer.update(jnp.ones(()), optimizer.init(param), param)
    np.testing.assert_allclose(moved(given, 1), [float(param + updates)], rtol=1e-6)
    assert moved(Optimizer(name="optax.contrib.schedule_free_adamw", learning_rate=0.1)).shape == (4,)


def test_its_learning_rate_follows_our_schedule() -> None:
    given = Optimizer(name="optax.sgd", learning_rate=0.4, schedule="linear")
    np.testing.assert_allclose(moved(given), moved(Optimizer(learning_rate=0.4, schedule="linear")), rtol=1e-6)


def test_a_schedule_of_optax_gets_the_runs_length(own: Path) -> None:
    options = {"init_value": 0.0, "peak_value": 0.8, "warmup_steps": 2}
    given = Optimizer(schedule="optax.warmup_cosine_decay_schedule", schedule_options=options)
    rates = optax.warmup_cosine_decay_schedule(0.0, 0.8, 2, 4)
    np.testing.assert_allclose(-np.diff([1.0, *moved(given)]), [rates(step) for step in range(4)], atol=1e-6)
    halved = Optimizer(schedule="myoptim:halves", schedule_options={"start": 0.4})
    np.testing.assert_allclose(-np.diff([1.0, *moved(halved)]), [0.4, 0.2, 0.1, 0.05], rtol=1e-5)


def test_one_of_ones_own_is_used_and_its_code_is_pinned(own: Path) -> None:
    given = Optimizer(name="myoptim:signed", learning_rate=0.1, options={"factor": 2.0})
    np.testing.assert_allclose(moved(given, 2), [0.8, 0.6], rtol=1e-6)
    config = config_module.from_dict(
        {"privacy": {"enabled": False}, "training": {"steps": 1}, "optimizer": {"name": "myoptim:signed"}}
    )
    before = user_code_digest(config)
    own.write_text(OWN + "\n# changed\n")
    assert user_code_digest(config) != before


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"name": "adam"}, "optimizer.learning_rate", "give one, such as 1e-3"),
        ({"name": "adamw"}, "optimizer.learning_rate", "needs a learning rate: 1, as"),
        ({"name": "optax.lion"}, "optimizer.learning_rate", "optax.lion needs one; give it"),
        ({"name": "myoptim:signed"}, "optimizer.learning_rate", "myoptim:signed needs one"),
        ({"name": "lion"}, "optimizer.name", "a path such as optax.lion, or module:function of your own"),
        ({"name": "adan"}, "optimizer.name", "did you mean adam?"),
        ({"name": "optax.lionn", "learning_rate": 1}, "optimizer.name", "did you mean lion?"),
        ({"name": "optax.apply_updates"}, "optimizer.options", "missing a required argument"),
        ({"name": "optax.global_norm", "options": {"updates": 1.0}}, "optimizer.name", "an optimizer is an optax"),
        ({"name": "optax.lion", "learning_rate": 1, "options": {"beta1": 0.9}}, "optimizer.options", "takes b1, b2"),
        (
            {"name": "optax.lion", "learning_rate": 1, "b1": 0.5},
            "optimizer.b1",
            "give optax.lion its optimizer.",
        ),
        ({"name": "optax.lion", "learning_rate": 1, "momentum": 0.5}, "optimizer.momentum", "belongs to sgd"),
        ({"name": "optax.lion", "options": {"learning_rate": 1}}, "optimizer.options", "as optimizer.learning_rate"),
        ({"name": "optax.scale", "learning_rate": 1, "options": {"step_size": 1}}, "optimizer.learning_rate", "none"),
        ({"name": "optax.polyak_sgd"}, "optimizer.name", "more than the noisy gradient"),
        ({"options": {"b1": 1}}, "optimizer.options", "sgd has settings of its own"),
        ({"name": "myoptim:no_optimizer"}, "optimizer.name", "returned a function; an optimizer is an optax"),
        ({"name": "myoptim:reading"}, "optimizer.name", "calls back into Python, where it could read data"),
        ({"name": "myoptim:shrinking"}, "optimizer.name", "no update of the shape of each parameter"),
        ({"name": "myoptim:broken", "learning_rate": 1}, "optimizer.name", "has no attribute 'sgdd'"),
        ({"name": "notthere:x", "learning_rate": 1}, "optimizer.name", "notthere"),
        ({"schedule": "cosin"}, "optimizer.schedule", "did you mean cosine?"),
        ({"schedule": "optax.cosine_decay"}, "optimizer.schedule", "did you mean cosine_decay_schedule?"),
        ({"schedule": "optax.cosine_decay_schedule"}, "optimizer.schedule_options", "missing a required argument"),
        ({"schedule": "optax.cosine_decay_schedule", "learning_rate": 1}, "optimizer.schedule", "leave out learning"),
        ({"schedule": "optax.global_norm", "schedule_options": {"updates": 1.0}}, "optimizer.schedule", "no schedule"),
        ({"schedule_options": {"init_value": 1}}, "optimizer.schedule_options", "to a schedule's path"),
    ],
)
def test_what_cannot_be_used_is_named(own: Path, settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        build(Optimizer(**settings), 10)
    assert caught.value.field == field
    assert words in caught.value.remedy


def test_the_rate_of_sgd_is_still_one() -> None:
    assert Optimizer().learning_rate == 1.0
    assert Optimizer(name="optax.scale", options={"step_size": -1.0}).learning_rate is None
