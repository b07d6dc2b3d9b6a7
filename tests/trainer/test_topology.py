"""Invariant 1: nothing of what a run computes depends on how many processes and devices there are, not a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import userland
from jobs import COMPILED_ANEW, STEPS, Jobs, Run, wait_all

EXACT = ["1x1", "1x4", "4x1", "3x1", "5x2"]
OTHERS = [*EXACT, "2x2 shard", "4x1 balanced"]


@pytest.fixture(scope="module")
def runs(jobs: Jobs, uninterrupted: Run, single: Run, four_processes: Run) -> dict[str, Run]:
    runs = {name: jobs.new(name.replace(" ", "-")) for name in ("1x4", "3x1", "5x2", "2x2 shard", "4x1 balanced")}
    wait_all([jobs.train(runs["1x4"], "cluster.devices_per_process=4", **COMPILED_ANEW)])
    wait_all(jobs.ranks(runs["3x1"], 3, 1))
    wait_all(jobs.ranks(runs["5x2"], 5, 2))
    wait_all(jobs.ranks(runs["2x2 shard"], 2, 2, "sampling.assignment=shard", **COMPILED_ANEW))
    wait_all(jobs.ranks(runs["4x1 balanced"], 4, 1, "sampling.assignment=balanced"))
    return runs | {"2x2": uninterrupted, "1x1": single, "4x1": four_processes}


@pytest.fixture(scope="module")
def loaded(jobs: Jobs, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `dpdist.load` brings back of every run, in a process with one device; `params` by name."""
    to = tmp_path_factory.mktemp("params")
    told = jobs.call("load", runs={name: str(run.root) for name, run in runs.items()}, to=str(to))
    return {name: told[name] | {"params": dict(np.load(Path(to) / f"{name}.npz"))} for name in runs}


@pytest.mark.parametrize("name", OTHERS)
def test_every_step_samples_and_draws_the_same_on_any_topology(runs: dict[str, Run], name: str) -> None:
    expected = runs["2x2"].digests
    assert sorted(expected) == list(range(STEPS))
    assert len({sample for sample, _ in expected.values()}) == STEPS
    assert len({noise for _, noise in expected.values()}) == STEPS
    assert runs[name].digests == expected


@pytest.mark.parametrize("name", OTHERS)
def test_ledger_and_epsilon_are_the_same_on_any_topology(runs: dict[str, Run], name: str) -> None:
    assert runs[name].plan == runs["2x2"].plan
    assert runs[name].charged == runs["2x2"].charged == list(range(STEPS))
    for key in ("epsilon", "epsilon_spent", "epsilon_rdp", "noise_multiplier", "sampling_probability", "dataset_size"):
        assert runs[name].summary[key] == runs["2x2"].summary[key], key


def test_the_summary_tells_the_topology(runs: dict[str, Run]) -> None:
    found = {name: (run.summary["processes"], run.summary["devices"]) for name, run in runs.items()}
    expected = {"1x1": (1, 1), "1x4": (1, 4), "3x1": (3, 3), "4x1": (4, 4), "2x2": (2, 4), "5x2": (5, 10)}
    assert found == expected | {"2x2 shard": (2, 4), "4x1 balanced": (4, 4)}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_have_the_same_bits_on_any_topology(runs: dict[str, Run], name: str) -> None:
    assert runs[name].summary["params_sha256"] == runs["2x2"].summary["params_sha256"]


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_agree_up_to_rounding_within_products(loaded: dict[str, dict[str, Any]], name: str) -> None:
    expected, found = loaded["2x2"]["params"], loaded[name]["params"]
    assert set(found) == set(expected) == {"a", "b", "c", "d"}
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["2x2", *OTHERS])
def test_accuracy_is_that_of_the_released_parameters_in_numpy(
    runs: dict[str, Run], loaded: dict[str, dict[str, Any]], name: str
) -> None:
    test = userland.test_columns()
    correct = np.argmax(userland.logits(loaded[name]["params"], test["image"]), axis=-1) == test["label"]
    assert runs[name].summary["accuracy"] == np.mean(correct) == loaded[name]["accuracy"]
    assert runs[name].summary["accuracy"] > 0.5
    assert loaded[name]["step"] == STEPS


def test_sums_that_xla_cuts_into_parts_have_the_same_bits_on_any_topology(jobs: Jobs) -> None:
    """The parts are as many as its pool has threads, which were once as many as cores or devices."""
    large = (
        "data.source=userland:pictures", "model.name=userland:pooling", "privacy.delta=1e-3", "training.steps=1",
        "sampling.expected_batch_size=24",
    )  # fmt: skip
    runs = {shape: jobs.new(f"pooling-{shape}") for shape in ((1, 1), (1, 4), (4, 1))}
    for (processes, devices), run in runs.items():
        wait_all([jobs.launch(run, processes, devices, *large, **COMPILED_ANEW)])
    assert len({run.summary["params_sha256"] for run in runs.values()}) == 1
