"""`dpdist plan`: the numbers of a run before there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jobs import CONFIG, Ended, Jobs

from dpdist_launch.plan import _size


@pytest.fixture(scope="module")
def planned(jobs: Jobs) -> Ended:
    return jobs.command("plan", str(jobs.config), "--json", "--nodes", "20", "--gpus-per-node", "4").wait()


def test_it_says_what_training_would_do(planned: Ended, jobs: Jobs) -> None:
    assert planned.code == 0, planned.err
    report = json.loads(planned.out)
    assert (report["dataset_size"], report["expected_batch_size"], report["steps"]) == (1000, 64, 16)
    assert report["sampling_probability"] == 0.064
    assert (report["devices"], report["nodes"]) == (80, 20)
    assert report["microbatches_per_step"] >= 1
    assert 0 <= report["padding"] < 1
    memory = report["memory"]
    assert memory["parameters"] == memory["trainable_parameters"] > 0
    # Parameters, momentum and average in float32, and two counters.
    assert 0 <= memory["state_bytes"] - 3 * 4 * memory["parameters"] <= 16
    assert memory["temporary_bytes"] > 0
    leaves = {leaf["path"]: leaf["strategy"] for leaf in report["clipping"]["parameters"]}
    assert leaves == {"a": "ghost", "b": "instantiate", "c": "ghost", "d": "instantiate"}
    epsilon = jobs.command(
        *("privacy", "epsilon", "--sampling-probability", "0.064", "--noise-multiplier", "4", "--steps", "16"),
        *("--delta", "1e-4"),
    ).wait()
    assert report["privacy"]["epsilon"] == json.loads(epsilon.out)["epsilon"]


def test_it_shows_the_choice_for_every_parameter_and_takes_another(jobs: Jobs, tmp_path: Path) -> None:
    tree = {section: dict(values) for section, values in CONFIG.items()}
    tree["training"] |= {"clipping": "bookkeeping", "clipping_strategies": {"c": "instantiate"}}
    tree["model"] |= {"trainable": ["a", "c", "d"]}
    config = tmp_path / "overruled.yaml"
    config.write_text(yaml.safe_dump(tree))
    ended = jobs.command("plan", str(config)).wait()
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["a", "12x16", "ghost"] in lines
    assert ["c", "16x4", "instantiate"] in lines
    assert ["d", "4", "instantiate", "no", "ghost", "norm", "for", "its", "use", "in", "add"] in lines
    assert "parameters  276, of which 260 train" in ended.out
    assert not (jobs.root / "runs").exists() or not list((jobs.root / "runs").glob("overruled*"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.trainable=[nothing/*]", "model.trainable"),
        ("training.clipping_strategies={z: ghost}", "training.clipping_strategies"),
        ("training.clipping_strategies={a: gohst}", "training.clipping_strategies.a"),
        ("training.physical_batch_size=100000000", "training.physical_batch_size"),
        ("sampling.expected_batch_size=2000", "sampling.expected_batch_size"),
    ],
)
def test_what_training_would_refuse_is_refused(jobs: Jobs, override: str, field: str) -> None:
    ended = jobs.command("plan", str(jobs.config), override).wait()
    assert ended.code == 2
    assert f"dpdist: error: {field} = " in ended.err


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**42, "4096.0 GiB")]
)
def test_sizes(count: float, shown: str) -> None:
    assert _size(count) == shown
