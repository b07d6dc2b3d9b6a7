"""Bad input is refused before anything is spent: exit code 2, the field, the value, and what to do instead."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import userland
from jobs import Jobs, Run, config_with, wait_all

Changes = dict[str, dict[str, Any]]

#: Section changes, the field the error names, and a part of its remedy.
CASES: dict[str, tuple[Changes, str, str]] = {
    "negative sigma": ({"privacy": {"noise_multiplier": -1.0}}, "privacy.noise_multiplier", "positive"),
    "no delta": ({"privacy": {"delta": None}}, "privacy.delta", "1/N"),
    "delta of 1/N": ({"privacy": {"delta": 1e-3}}, "privacy.delta", "allow_large_delta"),
    "unreachable epsilon": (
        {"privacy": {"noise_multiplier": None, "target_epsilon": 1e-12, "delta": 1e-12}},
        "privacy.target_epsilon",
        "cannot be reached",
    ),
    "not one step fits": (
        {"privacy": {"noise_multiplier": 0.5, "target_epsilon": 0.01}},
        "privacy.target_epsilon",
        "not even one step",
    ),
    "q above 1": ({"sampling": {"expected_batch_size": 1001}}, "sampling.expected_batch_size", "1000"),
    "steps and epochs": ({"training": {"steps": 3, "epochs": 2}}, "training.steps", "not both"),
    "wrong type": ({"training": {"steps": "many"}}, "training.steps", "int"),
    "null where a number must be": (
        {"sampling": {"expected_batch_size": None}},
        "sampling.expected_batch_size",
        "float",
    ),
    "unknown key": ({"privacy": {"detla": 1e-5}}, "privacy.detla", "delta"),
    "unknown section": ({"privcay": {"delta": 1e-5}}, "privcay", "sections are"),
    "unknown optimizer": ({"optimizer": {"name": "lion"}}, "optimizer.name", "adamw"),
    "unknown model": ({"model": {"name": "resnet"}}, "model.name", "mlp"),
    "no such module": ({"model": {"name": "absent:model"}}, "model.name", "absent"),
    "no such function": ({"model": {"name": "userland:absent"}}, "model.name", "absent"),
    "not a model": ({"model": {"name": "userland:no_model"}}, "model.name", "dpdist.models.Model"),
    "unknown model option": ({"model": {"options": {"depth": 3}}}, "model.options.depth", "takes"),
    "label out of range": ({"model": {"classes": 3}}, "model.classes", "outside 0 to 2"),
    "an integer that would wrap": (
        {"data": {"source": "userland:wide", "options": {"value": 5_000_000_000}}},
        "column 'number' of arrays",
        "do not fit into int32",
    ),
    "a float that would be infinite": (
        {"data": {"source": "userland:wide", "options": {"value": 1e39}}},
        "column 'number' of arrays",
        "do not fit into float32",
    ),
    "a constant loss": (
        {"model": {"loss": "userland:constant"}},
        "model.loss",
        "depends on no parameter that trains",
    ),
    "no derivative": ({"model": {"name": "userland:searching"}}, "training.clipping", "lax.scan"),
    "missing data path": ({"data": {"source": "idx"}}, "data.path", "path"),
    "no such directory": ({"data": {"source": "idx", "path": "/nowhere"}}, "data.path", "train-images"),
    "unknown source": ({"data": {"source": "imagenet"}}, "data.source", "digits"),
    "more devices than there are": ({"cluster": {"devices_per_process": 3}}, "cluster.devices_per_process", "not 3"),
    "too big for the memory": (
        {"cluster": {"memory_per_device": 1e-6}, "training": {"physical_batch_size": 64}},
        "training.physical_batch_size",
        "memory",
    ),
}


@pytest.fixture(scope="module")
def refused(jobs: Jobs) -> dict[str, tuple[Any, Run]]:
    """What `dpdist.trainer` says of each case, all in one process, whose one device JAX has made already."""
    runs = {name: jobs.new("bad") for name in CASES}
    answers = jobs.call("train_all", configs=[config_with(runs[name].root, **CASES[name][0]) for name in CASES])
    return {name: (answer, runs[name]) for name, answer in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name_with_a_remedy_and_nothing_is_spent(
    refused: dict[str, tuple[Any, Run]], name: str
) -> None:
    answer, run = refused[name]
    _, field, remedy = CASES[name]
    assert isinstance(answer, list), answer
    assert field in answer[0]
    assert remedy in answer[2]
    assert not run.ledger
    assert not (run.root / "checkpoints").exists() or not run.checkpoints


def test_a_loss_without_a_derivative_is_refused_by_its_equation_line_and_parameters(
    refused: dict[str, tuple[Any, Run]],
) -> None:
    (field, value, remedy), _ = refused["no derivative"]
    assert (field, value) == ("training.clipping", "auto")
    source = Path(userland.__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if "jax.lax.while_loop" in text)
    assert re.match(rf"while at \S*userland.py:{line}:\d+ \(.*apply\), which the gradient of a, b, c, d goes", remedy)


def test_a_corrected_mistake_trains_in_the_same_directory(jobs: Jobs) -> None:
    run = jobs.new("corrected")
    first = jobs.train(run, "privacy.delta=0.01").wait()
    assert first.code == 2
    assert "privacy.delta = 0.01: must be below 1/N" in first.err
    wait_all([jobs.train(run, "training.steps=2")])


def test_a_large_delta_is_accepted_where_it_is_asked_for(jobs: Jobs) -> None:
    run = jobs.new("delta")
    wait_all(
        [
            jobs.train(
                run,
                "training.steps=1",
                "privacy.delta=0.01",
                "privacy.allow_large_delta=true",
                "privacy.insecure_seed=null",
            )
        ]
    )
    assert "allow_large_delta" in run.summary["guarantee"]


def test_a_truncated_idx_file_is_told_with_its_sizes(jobs: Jobs, tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 3]) + np.array([10, 4, 4], ">u4").tobytes()
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + bytes(100)))
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(bytes([0, 0, 8, 1]) + np.array([10], ">u4").tobytes() + bytes(10))
    ended = jobs.train(jobs.new(), "data.source=idx", f"data.path={tmp_path}").wait()
    assert ended.code == 2
    assert "train-images-idx3-ubyte" in ended.err
    assert "expected 176 bytes, found 116" in ended.err


def test_a_directory_that_holds_something_else_is_left_alone(jobs: Jobs) -> None:
    run = jobs.new("thesis")
    run.root.mkdir()
    (run.root / "chapter1.tex").write_text("It was a dark night.")
    ended = jobs.train(run).wait()
    assert ended.code == 2
    assert "holds files but no run" in ended.err
    assert [path.name for path in run.root.iterdir()] == ["chapter1.tex"]


def test_an_export_is_not_trained_into(jobs: Jobs) -> None:
    export = jobs.new("an-export")
    export.root.mkdir()
    for name in ("config.yaml", "privacy.json"):
        (export.root / name).write_text("{}")
    ended = jobs.train(export).wait()
    assert ended.code == 2
    assert "holds an export; name a new or empty directory" in ended.err
    assert {path.name for path in export.root.iterdir()} == {"config.yaml", "privacy.json"}


def test_a_directory_that_cannot_be_written_is_named(jobs: Jobs) -> None:
    blocked = jobs.new("file")
    blocked.root.write_text("a file where a directory should be")
    ended = jobs.train(Run(blocked.root / "run")).wait()
    assert ended.code == 2
    assert "run.dir" in ended.err
    assert "cannot be written" in ended.err


def test_processes_with_different_configs_all_name_the_difference(jobs: Jobs) -> None:
    run = jobs.new("apart")
    ranks = [
        jobs.train(run, f"optimizer.learning_rate={rate}", **identity)
        for rate, identity in zip((0.5, 0.25), jobs.identities(2), strict=True)
    ]
    for ended in [rank.wait() for rank in ranks]:
        assert ended.code == 2
        assert "optimizer.learning_rate is 0.5 on rank 0 but 0.25 on rank 1" in ended.err
    assert not run.root.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "base.yaml", "privacy.delta"], "section.key=value"),
        (["train", "base.yaml", "--processes", "0"], "--processes"),
        (
            [
                "privacy",
                "epsilon",
                "--sampling-probability",
                "2",
                "--noise-multiplier",
                "1",
                "--steps",
                "1",
                "--delta",
                "1e-5",
            ],
            "(0, 1]",
        ),
        (
            [
                "privacy",
                "calibrate",
                "--sampling-probability",
                "0.1",
                "--target-epsilon",
                "-1",
                "--steps",
                "1",
                "--delta",
                "1e-5",
            ],
            "positive",
        ),
    ],
)
def test_a_wrong_command_line_exits_2(jobs: Jobs, arguments: list[str], part: str) -> None:
    ended = jobs.command(*arguments).wait()
    assert ended.code == 2
    assert part in ended.err
    assert "Traceback" not in ended.err
