"""The arms of a sweep and the numbers of a point, on virtual devices of this process."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from worlds import alone

import dpdist
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.data import Dataset, open_dataset
from dpdist.data.feed import Feed
from dpdist.errors import InputError
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.sampling import Assignment, assign
from dpdist.mechanism.step import DIAGNOSTICS, accumulate_sample, noisy_update
from dpdist.program.assignments import make_assigner, shape_of_work
from dpdist.program.build import OpenModel, build_setup, open_model
from dpdist.program.update import placed
from dpdist.run.fingerprints import environment
from dpdist.run.plan import plan_run
from dpdist_launch.measure.scaling import point
from dpdist_launch.measure.scaling.arms import (
    ARMS,
    DP,
    SGD,
    SGD_SYNC,
    Share,
    accumulate_and_share,
    all_reduces,
    config_of,
)

STEPS = 5


def config(run_dir: Path, **changes: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": "mlp", "options": {"hidden": [8], "scale": 16}},
        "privacy": {"noise_multiplier": 4.0, "delta": 1e-4},
        "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
        "sampling": {"expected_batch_size": 96},
        "training": {"steps": 10, "physical_batch_size": 8},
        "run": {"dir": str(run_dir)},
    }
    return dpdist.from_dict({name: tree.get(name, {}) | changes.get(name, {}) for name in tree | changes})


class Counting(Share):
    """A `Share` that counts how often it is used."""

    calls = 0

    def __call__(self, sums: Any) -> Any:
        self.calls += 1
        return super().__call__(sums)


def plan_of(config: Config, dataset: Dataset, opened: OpenModel, nonce: bytes) -> Plan:
    size, coordinates = len(dataset.train), opened.coordinates
    return plan_run(config, dataset_size=size, coordinates=coordinates, nonce=nonce, environment=environment("cpu"))


def trained(arm: str, asked: Config, world: World) -> tuple[list[Any], list[tuple[int, int, list[float]]], list[str]]:
    """Parameters after `STEPS` steps, the third an empty one; (microbatches, reductions, diagnostics); programs."""
    plain, dataset, secret = config_of(arm, asked), open_dataset(asked.data), Secret.from_insecure_seed(3)
    opened = open_model(plain, dataset)
    plan = plan_of(plain, dataset, opened, fresh_nonce(secret))
    setup = build_setup(plain, plan, opened, dataset, world, earlier=None)
    programs, keys = setup.step_programs, Keys(secret, bytes.fromhex(plan.nonce))
    state, sums = placed(setup.initial, programs.replicated), programs.zero_sums()
    share = Counting(sums, world.mesh) if arm == SGD_SYNC else None
    usual = make_assigner(plain, plan, setup, keys, world)

    def assigner(number: int) -> Assignment:
        if number != 2:
            return usual(number)
        nobody = np.empty(0, np.int64)
        return assign(
            number,
            nobody,
            assignment="balanced",
            dataset_size=plan.dataset_size,
            host_of_device=world.host_of_device,
            physical=setup.physical,
            tail=setup.tail,
        )

    feed = Feed(dataset.train, assigner, world.mesh, data=plain.data, start=0, stop=STEPS)
    steps = []
    for number in range(STEPS):
        assignment, before = feed.next_assignment(), 0 if share is None else share.calls
        count, key = assignment.rounds, programs.loss_key(keys, number)
        batches = feed.rounds(assignment)
        if share is None:
            sums = accumulate_sample(programs, state.params, sums, batches, key)
        else:
            sums = accumulate_and_share(programs, share, state.params, sums, batches, key)
        state, sums, diagnostics, _ = noisy_update(programs, state, sums, keys, number)
        reductions = 1 + (0 if share is None else share.calls - before)  # apply's own is always there
        steps.append((count, reductions, [len(assignment.sample), *np.asarray(diagnostics).tolist()]))
    feed.close()
    texts = [
        *(program.as_text() for program in programs.compiled().values()),
        *([share.program_text()] if share else []),
    ]
    return jax.tree.map(np.asarray, jax.tree.leaves(state.params)), steps, texts


@pytest.mark.parametrize("devices", [1, 4])
def test_reducing_after_every_batch_changes_when_and_not_what(devices: int, tmp_path: Path) -> None:
    asked, world = config(tmp_path), alone(devices)
    late, steps_late, _ = trained(SGD, asked, world)
    soon, steps_soon, texts = trained(SGD_SYNC, asked, world)
    for a, b in zip(late, soon, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    initial = initial_parameters(asked, world)
    assert max(float(np.abs(a - b).max()) for a, b in zip(late, initial, strict=True)) > 1e-2  # it did train
    assert [count for count, _, _ in steps_late] == [count for count, _, _ in steps_soon]
    assert steps_soon[2][0] == 0  # the empty step
    assert max(count for count, _, _ in steps_soon) > 1
    for count, reductions, (sampled, examples, *_) in steps_soon:
        assert reductions == max(1, count) == all_reduces(SGD_SYNC, asked, count)
        assert examples == sampled  # everyone counted once, however often the sums were reduced
    assert all(reductions == 1 for _, reductions, _ in steps_late)
    # What is counted above really is one all-reduce of one vector each, and accumulating holds none.
    if devices > 1:
        assert [len(re.findall(r" all-reduce\(", text)) for text in texts] == [0] * (len(texts) - 2) + [1, 1]


def initial_parameters(asked: Config, world: World) -> list[Any]:
    plain, dataset, secret = config_of(SGD, asked), open_dataset(asked.data), Secret.from_insecure_seed(3)
    opened = open_model(plain, dataset)
    plan = plan_of(plain, dataset, opened, fresh_nonce(secret))
    return jax.tree.leaves(build_setup(plain, plan, opened, dataset, world, earlier=None).initial.params)


@pytest.mark.parametrize(("arm", "placement"), [(DP, "designated"), (DP, "fused"), (SGD, "designated")])
def test_the_vectors_that_a_step_reduces_are_those_of_its_program(arm: str, placement: str, tmp_path: Path) -> None:
    asked = config(tmp_path, privacy={"noise_placement": placement})
    _, _, texts = trained(arm, asked, alone(2))
    reduced = [line.split(" all-reduce(")[0] for line in texts[-1].splitlines() if " all-reduce(" in line]
    vectors = [int(size) for line in reduced for size in re.findall(r"(?:f32|s64)\[(\d+)\]", line)]
    parameters = 8 * 8 * 8 + 8 + 8 * 10 + 10
    assert set(vectors) <= {parameters, parameters + len(DIAGNOSTICS)}
    assert len(vectors) == all_reduces(arm, asked, 7)


@pytest.mark.parametrize("arm", ARMS)
def test_a_point_says_what_was_measured(arm: str, tmp_path: Path) -> None:
    measured = point.measure(config(tmp_path), arm, 6, alone(4))
    assert measured is not None
    assert measured["devices"] == 4
    assert measured["processes"] == 1
    assert measured["steps"] == 6
    assert measured["examples_per_second_per_device"] == pytest.approx(measured["examples_per_second"] / 4)
    assert measured["expected_batch_size"] == 96
    # 96 examples in 6 steps, the median step is near the mean one: B / step time, up to the spread of six steps.
    assert 0.05 < measured["examples_per_second"] * measured["step_seconds"] / 96 < 20
    assert 0 < measured["step_seconds_p10"] <= measured["step_seconds"] <= measured["step_seconds_p90"]
    assert measured["compile_seconds"] > 0.05
    assert measured["seconds"] > measured["compile_seconds"] + 96 * 6 / measured["examples_per_second"]
    assert (measured["epsilon"] is None) == (arm != DP)
    reduces = {DP: 2, SGD: 1, SGD_SYNC: measured["microbatches_per_step"]}[arm]
    assert measured["all_reduces_per_step"] == pytest.approx(reduces)
    share = measured["all_reduce_seconds"] * reduces / measured["step_seconds"]
    assert measured["all_reduce_share"] == pytest.approx(share)
    assert measured["hardware"]["hosts"] == 1
    assert 50e6 < measured["hardware"]["peak_resident_bytes"] < 100e9
    assert measured["versions"]["jax"] == jax.__version__


def test_warming_up_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step of the warm-up takes a day."""
    steps: list[int] = []
    original, day = point.noisy_update, 86_400.0

    def slow_at_first(*arguments: Any) -> Any:
        steps.append(len(steps))
        return original(*arguments)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + day * min(len(steps), point.WARM_UP))
    monkeypatch.setattr(point, "time", clock)
    monkeypatch.setattr(point, "noisy_update", slow_at_first)
    measured = point.measure(config(tmp_path), SGD, 4, alone(1))
    assert measured is not None
    assert len(steps) == point.WARM_UP + 4
    assert 96 * 4 / measured["examples_per_second"] < day


def test_padding_and_imbalance_by_hand() -> None:
    ten, none = np.arange(10), np.arange(0)
    first = Assignment(0, ten, (ten[:6], ten[6:]), 4, 2)  # 2 x 6 slots for 10; 6 on one of two, 5 on average
    second = Assignment(1, ten[:8], (ten[:4], ten[4:8]), 4, 2)
    nobody = Assignment(2, none, (none, none), 4, 2)
    found = shape_of_work((first, second, nobody))
    assert found["padding"] == pytest.approx(1 - 18 / 20)
    assert found["imbalance"] == pytest.approx((6 / 5 + 1) / 2)
    assert found["microbatches_per_step"] == pytest.approx(1)
    assert shape_of_work((nobody,)) == {"padding": 0.0, "imbalance": 1.0, "microbatches_per_step": 0}


def test_all_arms_compute_the_physical_batch_that_the_private_one_can_hold(tmp_path: Path) -> None:
    """The plain arms would have memory for a larger one than a method that materialises every gradient."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"options": {"hidden": [64]}},
        "cluster": {"memory_per_device": 0.001},
        "training": {"physical_batch_size": "auto", "clipping": "per_example"},
        "sampling": {"expected_batch_size": 256},
    }
    asked, world = config(tmp_path, **changes), alone(1)
    found = [point.measure(asked, arm, 1, world) for arm in (DP, SGD)]
    sizes = {measured["physical_batch_size"] for measured in found if measured is not None}
    dataset, plain = open_dataset(asked.data), config_of(SGD, asked)
    opened = open_model(plain, dataset)
    plan = plan_of(plain, dataset, opened, b"")
    assert build_setup(plain, plan, opened, dataset, world, earlier=None).physical > sizes.pop()
    assert not sizes


def test_the_private_arm_needs_privacy(tmp_path: Path) -> None:
    plain = config(tmp_path, privacy={"enabled": False})
    with pytest.raises(InputError, match="leave dp out"):
        config_of(DP, plain)
    assert not config_of(SGD, config(tmp_path)).privacy.enabled
    assert config_of(SGD, plain) == plain
