"""`dpdist bench clipping`: the arms compute one sum, the numbers are what they are called, the files hold them."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.config import Model
from dpdist.mechanism.clipping import METHODS
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.models import build
from dpdist_launch.cli import main
from dpdist_launch.measure.bench import arms, clipping, naive, peers, table
from dpdist_launch.measure.bench.clipping import Request, distance, measure
from dpdist_launch.measure.bench.program import LARGEST, Compiled, Sums, largest_batch
from dpdist_launch.measure.bench.rounds import Times, interleaved, ratios
from dpdist_launch.measure.bench.tasks import TASKS, Problem, Task, problem_of
from tests.support.fake_arms import Clock, fake
from tests.support.small_tasks import BOUNDS, IMAGE, MLP, VIT

pytestmark = pytest.mark.compiles  # seconds, memory and operations are those of programs compiled here

CNN = Task(model=Model(name="cnn"), example=IMAGE, bounds=BOUNDS, batch=6)
BERT = Task(
    model=Model(
        name="bert",
        options={"variant": "mini", "vocabulary": 20, "positions": 16, "width": 12, "depth": 2, "heads": 3, "mlp": 24},
    ),
    example={"input_ids": ((9,), "int32"), "label": ((), "int32")},
    bounds={"input_ids": 20, "label": 3},
    batch=6,
)
RESNET = Task(
    model=Model(name="bit_resnet", options={"image_size": 32, "layers": [1, 1], "channels": [128, 256]}),
    example={"image": ((32, 32, 3), "uint8"), "label": ((), "int32")},
    bounds=BOUNDS,
    batch=3,
)


def test_arms_take_turns_and_each_round_begins_with_the_next() -> None:
    order: list[str] = []
    clock = Clock()

    def run(name: str) -> Callable[[], None]:
        def called() -> None:
            order.append(name)
            clock.now += 1.0

        return called

    times = interleaved({name: run(name) for name in "abc"}, rounds=4, seconds=0.5, clock=clock)
    # Two calls a turn, of which the first is not timed.
    assert "".join(order[::2]) == "".join(order[1::2]) == "abc" + "bca" + "cab" + "abc"
    assert {name: found.wall for name, found in times.items()} == {name: [1.0] * 4 for name in "abc"}


def test_a_turn_is_the_mean_of_the_calls_that_fill_it_without_the_first() -> None:
    clock = Clock()
    costs = iter([100.0, 1.0, 2.0, 3.0, 100.0, 4.0, 4.0])
    times = interleaved({"a": clock.run(costs)}, rounds=2, seconds=5.0, clock=clock, processor=lambda: 3 * clock.now)
    assert times == {"a": Times(wall=[2.0, 4.0], processor=[6.0, 12.0])}


def test_ratios_compare_within_a_round() -> None:
    found = ratios([1.1, 22.0, 3.6, 1.3, 1.4], [1.0, 20.0, 3.0, 1.0, 1.0])
    assert found == pytest.approx({"ratio": 1.2, "ratio_p25": 1.1, "ratio_p75": 1.3})


def test_every_arm_is_compared_with_the_fastest_plain_sgd_of_its_own_framework() -> None:
    clock = Clock()
    measured = [
        fake("sgd", 3.0, clock, sums=7.0),
        fake("sgd loop", 2.0, clock, sums=7.0),
        fake("auto", 3.0, clock, sums=1.5),
        fake("per_example", 4.0, clock),
        fake("torch sgd", 1.0, clock, framework="torch", sums=7.0),
        fake("opacus", 2.5, clock, framework="torch"),
        fake("broken", -1.0, clock, framework="torch"),
    ]
    found = measure(
        MLP, 6, measured, naive=False, rounds=3, seconds=0.0, clock=clock, processor_clock=lambda: -clock.now
    )
    numbers = found["arms"]
    assert {name: arm.get("ratio") for name, arm in numbers.items()} == {
        "sgd": 1.5,
        "sgd loop": 1.0,
        "auto": 1.5,
        "per_example": 2.0,
        "torch sgd": 1.0,
        "opacus": 2.5,
        "broken": None,
    }
    assert found["baselines"] == {"jax": "sgd loop", "torch": "torch sgd"}
    assert numbers["auto"]["seconds"] == 3.0
    # By the second clock the other plain form is the faster.
    assert found["processor_baselines"]["jax"] == "sgd"
    assert numbers["auto"]["processor_seconds_by_round"] == [-3.0] * 3
    assert numbers["auto"]["processor_ratio"] == 1.0
    assert numbers["auto"]["examples_per_second"] == 2.0
    assert numbers["auto"]["seconds_by_round"] == [3.0] * 3
    # Private sums are compared with per_example's, whatever the order; plain ones with each other.
    assert numbers["auto"]["difference"] == 0.5
    assert numbers["opacus"]["difference"] == numbers["torch sgd"]["difference"] == 0.0
    assert numbers["broken"] == {"framework": "torch", "private": True, "failed": "ValueError: cannot"}
    assert found["batch"] == 6
    assert found["parameters"] == 256 * 8 + 8 + 8 * 10 + 10


@pytest.fixture(scope="module")
def half_clipped() -> tuple[Problem, list[Sums], np.ndarray]:
    """A batch of the small CNN with a padded row, of whose gradients some are clipped; every gradient; the norms."""
    problem = problem_of(CNN, CNN.batch)
    gradient_of, gradients = jax.jit(jax.grad(problem.loss)), []
    for i in range(problem.size):
        gradient = gradient_of(problem.params, {name: column[i] for name, column in problem.batch.items()})
        gradients.append(dict(zip(paths_of(gradient), map(np.asarray, jax.tree.leaves(gradient)), strict=True)))
    norms = np.array([np.sqrt(sum(np.sum(np.square(leaf)) for leaf in own.values())) for own in gradients])
    problem = dataclasses.replace(problem, clip_norm=float(np.median(norms)), mask=problem.mask.at[-1].set(0.0))
    return problem, gradients, norms


def weighted(gradients: list[Sums], weights: np.ndarray) -> Sums:
    return {path: sum(w * own[path] for w, own in zip(weights, gradients, strict=True)) for path in gradients[0]}


@pytest.mark.parametrize("name", [name for name in arms.ARMS if name not in (*arms.PLAIN, arms.NAIVE)])
def test_every_arm_computes_the_same_clipped_sum(
    name: str, half_clipped: tuple[Problem, list[Sums], np.ndarray]
) -> None:
    problem, gradients, norms = half_clipped
    factors = np.minimum(1.0, problem.clip_norm / norms)
    assert 0 < np.sum(factors[:-1] < 1) < problem.size - 1
    with jax.default_matmul_precision("highest"):  # or `tensor` rounds what products read, as tensor cores would
        program = arms.jax_arm(name).prepare(problem)
    expected = weighted(gradients, np.array(problem.mask) * factors)
    assert distance(program.read(program.run()), expected) < (2e-3 if name == arms.TENSOR else 2e-5)
    assert program.compiled is not None
    assert program.compiled.temp_bytes > 0
    assert program.compiled.memory > program.compiled.temp_bytes
    assert program.compiled.flops


@pytest.mark.parametrize("name", arms.PLAIN)
def test_a_plain_arm_does_not_clip(name: str, half_clipped: tuple[Problem, list[Sums], np.ndarray]) -> None:
    problem, gradients, _ = half_clipped
    program = arms.jax_arm(name).prepare(problem)
    assert distance(program.read(program.run()), weighted(gradients, np.array(problem.mask))) < 1e-5


def test_every_method_of_the_mechanism_has_an_arm() -> None:
    assert set(METHODS) < set(arms.ARMS)


def test_naive_compiles_for_every_new_size_and_its_mean_includes_that() -> None:
    problem = problem_of(MLP, 3)
    clock = Clock()
    traced: list[int] = []

    def grad_sum(params: Any, batch: Any, mask: Any) -> Any:
        traced.append(mask.shape[0])
        clock.now += 10.0  # runs while tracing only, as compiling does
        return jax.tree.map(jnp.zeros_like, params), mask

    found = naive.naive_series(grad_sum, problem, steps=8, clock=clock)
    sizes = found["sizes"]
    assert len(sizes) == 8
    assert len(set(sizes)) > 2
    assert sorted(traced) == sorted(set(sizes) - {0})
    assert found["compilations"] == len(set(sizes) - {0})
    assert found["seconds"] == 10.0 * found["compilations"] / 8
    assert found["examples_per_second"] == sum(sizes) / (10.0 * found["compilations"])


@pytest.mark.parametrize(
    ("limit", "start", "expected"),
    [(1000, 4, 64), (1000, 6, 64), (1000, 200, 64), (139, 4, 2), (109, 4, None), (1e12, 4, LARGEST)],
)
def test_the_largest_batch_is_the_last_power_of_two_that_fits(limit: float, start: int, expected: int | None) -> None:
    def compile_at(size: int) -> Compiled:
        return Compiled(seconds=0, temp_bytes=100 + 10 * size, argument_bytes=size, output_bytes=size, flops=None)

    assert largest_batch(compile_at, limit=limit, start=start) == expected


def test_a_batch_that_the_compiler_refuses_does_not_fit() -> None:
    def compile_at(size: int) -> Compiled:
        if size > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Compiled(seconds=0, temp_bytes=size, argument_bytes=0, output_bytes=0, flops=None)

    assert largest_batch(compile_at, limit=1e12, start=4) == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--models", "mnist-cnn,nope"], ["--models", "'nope'", *TASKS]),
        (["--methods", "auto,nope"], ["--methods", "'nope'", *arms.ARMS]),
        (["--models", ","], ["--models", "name at least one"]),
        (["--batch", "nope=3"], ["--batch", "'nope'", *TASKS]),
        (["--batch", "vit-ti=many"], ["--batch", "give a whole number"]),
        (["--batch", "0"], ["--batch", "at least 1"]),
        (["--rounds", "0"], ["--rounds", "at least 1"]),
        (["--seconds", "nan"], ["--seconds"]),
        (["--format", "fp16"], ["--format", "'fp16'", "bf16"]),
        (["--time-limit", "0"], ["--time-limit"]),
        (["--largest-batch", "--memory", "0"], ["--memory"]),
    ],
)
def test_bad_input_names_the_choices(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "clipping", *argv]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert all(word in printed.err for word in words)


def test_peers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert main(["bench", "clipping", "--peers"]) == 2
    error = capsys.readouterr().err
    assert "jax_privacy, torch, opacus" in error
    assert "[peers]" in error


def test_help_names_every_model_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "clipping", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in (*TASKS, *arms.ARMS))


def test_files_and_table_hold_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "tiny", MLP)
    monkeypatch.setitem(TASKS, "tinier", MLP)
    monkeypatch.setattr(clipping, "largest_batch", lambda compile_at, *, limit, start: int(limit) // start)
    monkeypatch.setattr(clipping, "naive_series", partial(naive.naive_series, steps=2))
    to = tmp_path / "new" / "results"
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    options = "--models tiny,tinier --methods per_example,naive --batch tinier=3 --rounds 2 --seconds 0"
    assert main(["bench", "clipping", *options.split(), "--largest-batch", "--memory", "1", "--to", str(to)]) == 0
    assert jax.config.jax_enable_compilation_cache == cached  # type: ignore[attr-defined]
    printed = capsys.readouterr()
    assert {path.name for path in to.iterdir()} == {"clipping.json", "clipping.md"}
    assert (to / "clipping.md").read_text() == printed.out
    content = json.loads((to / "clipping.json").read_text())
    assert content.keys() >= {"command", "started", "written", "settings", "machine", "versions", "about", "models"}
    assert content["machine"].keys() >= {"cpu", "cores", "device_kind"}
    assert content["versions"].keys() >= {"jax", "jaxlib", "dpdist", "commit"}
    assert [model["batch"] for model in content["models"].values()] == [6, 3]
    for model in content["models"].values():
        assert list(model["arms"]) == ["sgd", "per_example", "naive"]
        for name in ("sgd", "per_example"):
            numbers = model["arms"][name]
            assert len(numbers["seconds_by_round"]) == 2
            assert numbers["seconds"] == np.median(numbers["seconds_by_round"])
            assert numbers["processor_seconds"] > 0
            assert numbers.keys() >= {"ratio", "compile_seconds", "temp_bytes", "flops", "difference"}
            assert numbers["largest_batch"] == 2**30 // model["batch"]
        series = model["arms"]["naive"]
        assert series["compilations"] == len(set(series["sizes"]) - {0})
        assert series["ratio"] > model["arms"]["per_example"]["ratio"]
    rows = [line for line in printed.out.splitlines() if line.startswith(("| sgd |", "| per_example |", "| naive |"))]
    assert len(rows) == 4 * 3  # ratios, of processor time too, rates, largest batches
    assert "| arm | tiny b6 | tinier b3 |" in printed.out
    assert "naive on tiny: mean over 2 steps" in printed.out
    assert "tiny: round 2 of 2" in printed.err
    assert "tinier: naive" in printed.err


def test_the_table_shows_the_best_what_failed_and_wrong_sums() -> None:
    def arm(ratio: float, *, private: bool = True, **more: Any) -> dict[str, Any]:
        numbers = {"seconds": ratio / 10, "ratio": ratio, "examples_per_second": 40 / ratio}
        return {"framework": "jax", "private": private, "difference": 0.0, **numbers, **more}

    found = {
        "sgd": arm(1.0, private=False, temp_bytes=2**20, flops=1e9),
        "auto": arm(
            1.25,
            processor_seconds=0.2,
            processor_ratio=1.1,
            temp_bytes=2**21,
            peak_bytes=5 * 2**20,
            flops=3e9,
            compile_seconds=4.0,
            ratio_p25=1.2,
            ratio_p75=1.3,
        ),
        "per_example": arm(1.5, difference=0.5),
        "opacus": {"framework": "torch", "private": True, "failed": "RuntimeError: no"},
    }
    content = {
        "command": ["dpdist", "bench"],
        "started": "then",
        "written": "now",
        "settings": {"format": "bf16", "rounds": 3, "seconds_a_turn": 0.3, "memory_limit": None},
        "machine": {"platform": "cpu", "device_kind": "cpu", "cpu": "X", "cores": 2, "memory_bytes": 2**34},
        "versions": {"jax": "0"},
        "about": {name: "what it is" for name in found},
        "absent": {"fastDP": "not installable from a registry"},
        "models": {
            "m": {
                "batch": 4,
                "parameters": 10,
                "load_before": 0.5,
                "baselines": {"jax": "sgd"},
                "processor_baselines": {"jax": "sgd loop"},
                "arms": found,
            }
        },
    }
    page = table.text(content)
    assert "| sgd | 1.00 · 100 ms |" in page
    assert "| auto | **1.25 · 125 ms** |" in page
    assert "| per_example | 1.50 · 150 ms |" in page
    assert "| opacus | failed |" in page
    assert "| auto | **32.0 · 1.25** |" in page
    assert "| m | auto | 1.20 to 1.30 | 4.0 | 2 | 2.00 | 5 | 3 | 3.00 | 0e+00 |" in page
    assert "opacus failed on m: RuntimeError: no" in page
    assert "per_example computes ANOTHER SUM on m" in page
    assert "fastDP was not measured: not installable from a registry." in page
    assert "The fastest were: m `sgd`." in page
    assert "The fastest were: m `sgd loop`." in page
    assert "| auto | **1.10 · 200 ms** |" in page
    assert "times on a CPU" in page
    found["auto"]["difference"] = 4e-3  # as bfloat16 rounds
    assert "auto computes" not in table.text(content)
    content["settings"] = content["settings"] | {"format": "float32"}
    assert "auto computes ANOTHER SUM on m" in table.text(content)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mnist-cnn", 26_010),
        ("vit-ti", 5_543_716),
        ("r50x1", 23_705_252),
        ("bert-mini", 11_171_074),
    ],
)
def test_the_tasks_are_the_models_they_are_called(name: str, parameters: int) -> None:
    task = TASKS[name]
    model = build(task.model, example=task.shapes(), classes=task.classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    examples = task.examples(2)
    assert {column: (values.shape[1:], values.dtype.name) for column, values in examples.items()} == task.example


def test_a_request_without_methods_measures_all() -> None:
    assert Request(models=["mnist-cnn"]).methods == tuple(arms.ARMS)
    names = [arm.name for arm in clipping.arms_of(Request(models=["mnist-cnn"], methods=["naive", "auto"]))]
    assert names == ["sgd", "auto"]


@pytest.mark.parametrize("task", [CNN, MLP, VIT, BERT, RESNET], ids=lambda task: task.model.name)
def test_peers_compute_the_same_sums_from_the_same_weights(task: Task) -> None:
    for package in ("jax_privacy", "torch", "opacus"):
        pytest.importorskip(package)
    measured = clipping.arms_of(Request(models=["mnist-cnn"], methods=["per_example"], peers=True))
    found = measure(task, task.batch, measured, naive=False, rounds=1, seconds=0.0)["arms"]
    assert {name for name in found if name not in arms.ARMS} == set(peers.PEERS)
    for name, numbers in found.items():
        assert numbers["difference"] < 2e-5, name
