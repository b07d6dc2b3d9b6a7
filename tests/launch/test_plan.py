"""`dpdist plan`: the numbers of a run before there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jobs import CONFIG, Ended, Jobs
from private_runs import config_of, private_run

from dpdist.errors import InputError
from dpdist.joint.charging import charge, require_room, room_for
from dpdist.joint.registry import create
from dpdist.joint.standing import standing
from dpdist.mechanism.ledger import Ledger
from dpdist.run.layout import RunPaths
from dpdist_launch.plan import _size, text


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


ELSEWHERE = ("--device", "A100", "--devices", "80", "--json")


def test_a_cluster_elsewhere_needs_neither_data_nor_weights(jobs: Jobs, tmp_path: Path) -> None:
    config = tmp_path / "vit.yaml"
    options = {
        "pretrained": "/nowhere/weights",
        "image_size": 32,
        "patch": 8,
        "width": 32,
        "depth": 3,
        "heads": 2,
        "mlp": 64,
    }
    config.write_text(
        yaml.safe_dump(
            {
                "data": {"source": "cifar100", "path": "/nowhere/cifar.tar.gz"},
                "model": {"name": "vit", "options": options},
                "optimizer": {"name": "adam", "learning_rate": 1e-3},
                "privacy": {"target_epsilon": 8.0, "delta": 1e-5},
                "sampling": {"expected_batch_size": 5000},
                "training": {"steps": 100},
            }
        )
    )
    ended = jobs.command("plan", str(config), *ELSEWHERE).wait()
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["devices"], report["nodes"], report["dataset_size"], report["steps"]) == (80, 20, 50_000, 100)
    assert report["privacy"]["epsilon"] <= 8.0
    memory, estimate = report["memory"], report["estimate"]
    # Parameters and both moments of adam in float32, and two counters.
    assert 0 <= memory["state_bytes"] - 3 * 4 * memory["parameters"] <= 16
    assert estimate["node_hours"] == pytest.approx(20 * estimate["hours"])
    # Each device has 62.5 examples a step and some padding.
    assert 1 <= estimate["seconds_per_step"] / estimate["seconds_per_example"] / 62.5 < 1.5
    assert estimate["hours"] == pytest.approx(100 * estimate["seconds_per_step"] / 3600)
    fewer = json.loads(jobs.command("plan", str(config), "--device=A100", "--devices=40", "--json").wait().out)
    assert 1.7 < fewer["estimate"]["hours"] / estimate["hours"] < 2.3
    registry = ("run.registry=/nowhere", "run.registry_dataset=people")
    text = jobs.command("plan", str(config), "--device=A100", "--devices=80", *registry).wait().out
    assert "people: not here, so whether the run fits is not known" in text
    assert "an ESTIMATE of the gradients alone, by assumed rates of the A100 in tf32" in text
    assert "layers/*/mlp/grow/kernel (3)" in text
    assert "head/kernel" in text


def test_its_facts_are_those_of_a_plan_made_here(jobs: Jobs, planned: Ended) -> None:
    ended = jobs.command("plan", str(jobs.config), *ELSEWHERE).wait()
    assert ended.code == 0, ended.err
    here, there = json.loads(planned.out), json.loads(ended.out)
    assert here.keys() | {"estimate"} == there.keys()
    assert here["memory"].keys() == there["memory"].keys()
    for name in ("privacy", "sampling_probability", "dataset_size", "steps", "devices", "nodes"):
        assert there[name] == here[name]
    for name in ("parameters", "trainable_parameters", "state_bytes", "sums_and_noise_bytes"):
        assert there["memory"][name] == here["memory"][name]


COLUMNS = "--columns=image=float32[12],label=int32[]"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device=A1000", "--devices=8"), "--device = 'A1000': is in no table; give one of V100, A100"),
        (("--device=A100", "--devices=0"), "--devices = 0: give at least 1"),
        (("--devices=8",), "--devices = 8: belongs to --device"),
        (("--device=A100", "--examples=5000"), "--columns = None: without the data it is not known"),
        (("--device=A100", COLUMNS), "--examples = None: without the data it is not known"),
        (("--device=A100", "--examples=5000", "--columns=image"), "write NAME=DTYPE[SHAPE]"),
        (("--device=A100", "--examples=5000", "--columns=image=floot[3]"), "floot"),
        (("--device=A100", "--examples=50", COLUMNS), "sampling.expected_batch_size"),
        (("--device=V100", "training.precision=tensor"), "the V100 has no tensor cores"),
        (("--device=A100", "data.source=npy", "data.path=/nowhere"), "To plan without it, give --examples N"),
    ],
)
def test_what_is_wrong_or_not_known_is_named(jobs: Jobs, options: tuple[str, ...], words: str) -> None:
    ended = jobs.command("plan", str(jobs.config), *options).wait()
    assert ended.code == 2, ended.out
    assert words in ended.err
    assert len(ended.err.splitlines()) == 1


def test_examples_and_columns_stand_in_for_data(jobs: Jobs) -> None:
    ended = jobs.command("plan", str(jobs.config), *ELSEWHERE, "--examples=5000", COLUMNS).wait()
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["dataset_size"] == 5000


def test_it_shows_what_a_search_costs_beside_one_run_and_beside_all_runs_released(jobs: Jobs, tmp_path: Path) -> None:
    create(tmp_path, "people", delta=1e-4, budget=100.0)
    named = (f"run.registry={tmp_path}", "run.registry_dataset=people", "privacy.insecure_seed=null")
    found = jobs.command("plan", str(jobs.config), *named, "--json", "--trials", "8").wait()
    assert found.code == 0, found.err
    report = json.loads(found.out)
    search, privacy = report["search"], report["privacy"]
    assert search["epsilon_of_one_run"] == privacy["epsilon"]
    assert (search["distribution"], search["expected_trials"], search["runs_released"]) == ("geometric", 8, 8)
    assert privacy["epsilon"] < search["epsilon_of_search"] < search["epsilon_of_all_released"]
    assert search["noise_multiplier_of_search"] > privacy["noise_multiplier"]
    shown = text(report)
    assert f"the best alone released: epsilon {search['epsilon_of_search']:.4g}; 8 runs, all released: " in shown
    assert (report["registry"]["fits"], report["registry"]["epsilon_with_this_run"]) == (True, privacy["epsilon"])
    assert "\nregistry    people: epsilon 0 at delta 0.0001 spent by 0 run(s), 100 of 100 left; with this run " in shown
    assert "a search cannot be charged to it" in shown
    plain = jobs.command("plan", str(jobs.config), "privacy.enabled=false", "--trials", "8").wait()
    assert plain.code == 2
    assert "has no privacy" in plain.err


@pytest.mark.parametrize("budget", [None, 0.2, 9.0])
def test_it_says_whether_the_registry_has_room_exactly_where_a_start_would_find_it(
    tmp_path: Path, budget: float | None
) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=budget)
    named = {"registry": str(tmp_path / "reg"), "registry_dataset": "people"}
    runs = [RunPaths(private_run(tmp_path / name, run=named)) for name in "ab"]
    plans = [Ledger(run.ledger) for run in runs]
    config = config_of(run=named)
    for run, ledger in zip(runs, plans, strict=True):
        assert ledger.plan is not None
        found = room_for(config, ledger.plan)
        assert found is not None
        if not found["fits"]:
            with pytest.raises(InputError, match=f"it would be {found['epsilon_with_this_run']:.4g}"):
                require_room(config, run, ledger, ledger.plan)
            break
        charge(config, run, ledger)
        assert found["epsilon_with_this_run"] == standing(tmp_path / "reg", "people")["epsilon"]
    told = standing(tmp_path / "reg", "people")
    assert len(told["runs"]) == (1 if budget == 0.2 else 2)
    assert found["left"] == (None if budget is None else pytest.approx(budget - found["epsilon"]))
    assert room_for(config_of(), plans[0].plans[0]) is None
