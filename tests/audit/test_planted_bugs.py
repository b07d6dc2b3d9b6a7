"""Ten planted bugs, each caught by the audit: epsilon is more than the accountant claims, at the audit's confidence.

With `-s` the figures of docs/audit.md are printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import planted
import pytest
from worlds import alone

import dpdist
from dpdist import config as config_module
from dpdist.audit import checks
from dpdist.audit.checks import Check
from dpdist.errors import InputError
from dpdist.program import build

#: Of each of the bounds of an audit that holds with 95%.
CONFIDENCE = checks.confidence_each(0.95)
SETTINGS = {setting.name: setting for setting, _, _ in checks.SETTINGS}


@pytest.fixture(autouse=True)
def _the_same_secrets_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit is as random as the noise; so that a test is not, its secrets come from a counter."""
    numbers = itertools.count()
    monkeypatch.setattr(secrets, "token_bytes", lambda size: hashlib.shake_128(b"%d" % next(numbers)).digest(size))
    monkeypatch.setattr(secrets, "token_hex", lambda size: secrets.token_bytes(size).hex())


@pytest.fixture(autouse=True)
def _without_checks_of_shapes() -> Iterator[None]:
    """Other tests check the arrays' shapes; in thousands of steps that takes longer than the steps."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def audited(name: str, runs: int, *, devices: int = 1, width: int = 64) -> Check:
    """A setting of the audit, at the first of its deltas; the fewer the parameters, the faster it is."""
    setting = dataclasses.replace(SETTINGS[name], width=width)
    return next(checks.check_setting(setting, alone(devices), runs=runs, confidence=CONFIDENCE))


def shown(what: str, check: Check) -> Check:
    """The check, printed."""
    said = f"epsilon is at least {check.epsilon_lower:.2f}, claimed {check.epsilon_claimed:.2f}, delta {check.delta:g}"
    print(f"\n{what}: {check.name}, {said}, {check.evidence}")
    return check


def trained(name: str, folder: Path) -> Check:
    """A training of the audit."""
    plan = next(plan for plan in checks.TRAININGS if plan.name == name)
    released, epsilon = [], 0.0
    for settings in plan.configs(folder):
        epsilon = dpdist.train(config_module.from_dict(settings))["epsilon"]
        released.append(dpdist.load(folder / "run").params)
    return checks.check_training(plan, folder, released, epsilon_claimed=epsilon, confidence=CONFIDENCE)


@pytest.mark.parametrize(
    ("plant", "setting", "runs", "devices"),
    [
        (planted.noise_scaled_wrongly, "one step", 400, 1),
        (planted.noise_per_device, "one step", 500, 4),
        (planted.one_key_for_two_leaves, "one step", 100, 1),
        (planted.realised_batch_normaliser, "one step", 400, 1),
        (planted.shuffling_instead_of_poisson, "sampled step", 500, 1),
        (planted.clipping_after_averaging, "loud step", 550, 1),
        (planted.padding_with_real_examples, "one step", 400, 1),
        (planted.float32_scaling_of_the_draw, "lowest bits", 90, 1),
        (planted.layer_that_mixes_examples, "one step", 400, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bug_of_the_mechanism_is_caught(
    monkeypatch: pytest.MonkeyPatch, plant: planted.Plant, setting: str, runs: int, devices: int
) -> None:
    plant(monkeypatch)
    if plant is planted.clipping_after_averaging:  # or the self-test of a run would refuse it
        monkeypatch.setattr(build, "require_guards", lambda *_, **__: None)
    width = SETTINGS[setting].width if plant is planted.one_key_for_two_leaves else 64
    check = shown(plant.__name__, audited(setting, runs, devices=devices, width=width))
    assert check.epsilon_lower > check.epsilon_claimed, check


def test_noise_that_is_reused_when_a_run_goes_back_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planted.noise_reused_on_resume(monkeypatch)
    check = shown("noise_reused_on_resume", trained("went back", tmp_path))
    assert check.epsilon_lower > check.epsilon_claimed, check


def test_without_a_bug_the_bound_is_over_half_of_the_claim_and_not_beyond_it() -> None:
    check = shown("no bug", audited("loud step", 1000))
    assert 0.5 * check.epsilon_claimed < check.epsilon_lower < check.epsilon_claimed, check


def test_the_self_test_of_a_run_refuses_to_clip_after_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.clipping_after_averaging(monkeypatch)
    with pytest.raises(InputError, match="nothing bounds one record"):
        audited("one step", 6)
