"""`dpdist bench memory`: bytes are those of compiled programs, and the largest batches follow from them."""

# Called so that it comes after test_local.py: that one forks this process, which JAX must not have started in yet.

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpdist_launch.cli import main
from dpdist_launch.measure.bench import arms, memory
from dpdist_launch.measure.bench.memory import Need, need_of, task_of
from dpdist_launch.measure.bench.tasks import TASKS, problem_of
from tests.support.small_tasks import MLP


def test_the_largest_batch_is_where_the_line_through_both_sizes_reaches_the_limit() -> None:
    need = need_of((2, 6), (100, 140))
    assert need == Need(per_example=10.0, fixed=80.0)
    assert [need.largest(limit) for limit in (200, 199, 90, 50)] == [12, 11, 1, 0]


def test_a_length_makes_another_task_of_tokens() -> None:
    assert task_of("bert-base:512").example["input_ids"] == ((512,), "int32")
    assert task_of("bert-base") is TASKS["bert-base"]


@pytest.mark.compiles  # the bytes are those of programs compiled here
def test_bytes_are_those_of_the_program_that_the_bench_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "tiny", MLP)
    to = tmp_path / "memory.json"
    options = "--models tiny --methods per_example --format tf32 --sizes 2,6 --memory 0.001,1"
    assert main(["bench", "memory", *options.split(), "--to", str(to)]) == 0
    content = json.loads(to.read_text())
    found = content["models"]["tiny"]
    assert list(found) == ["sgd", "per_example"]
    program = arms.jax_arm("per_example").prepare(problem_of(MLP, 6))
    assert program.compiled is not None
    assert found["per_example"]["bytes"][1] == program.compiled.memory
    gradient = 4 * (256 * 8 + 8 + 8 * 10 + 10)
    assert found["per_example"]["per_example"] > found["sgd"]["per_example"] + gradient / 2
    assert found["sgd"]["largest"][1] > found["per_example"]["largest"][1]
    ratio = found["per_example"]["largest"][1] / found["sgd"]["largest"][1]
    assert f"· {ratio:.2f} |" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--models", "nope"], ["--models", "'nope'", "gpt2-small"]),
        (["--models", "vit-b:12"], ["--models", "model of tokens"]),
        (["--models", "bert-base:many"], ["--models", "number of tokens"]),
        (["--methods", "naive"], ["--methods", "tensor"]),
        (["--format", "fp16"], ["--format", "bf16"]),
        (["--sizes", "8"], ["--sizes", "two numbers"]),
        (["--sizes", "8,8"], ["--sizes", "smaller first"]),
        (["--memory", "much"], ["--memory", "give numbers"]),
        (["--target", "GTX"], ["--target", "H100"]),
    ],
)
def test_bad_input_is_told_before_anything_is_compiled(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "bytes_of", lambda *_: pytest.fail("compiled"))
    assert main(["bench", "memory", *argv]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
