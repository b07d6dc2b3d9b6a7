"""`bash launch/gpu.sh`: steps within a budget, each with its own limit; results survive what ends one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpdist_launch.measure.gpu import page, runner, steps
from dpdist_launch.measure.gpu.runner import Context, Step, run

ROOT = Path(__file__).parents[2]
#: A step's program: writes {"n": N}, then does what else it is told.
WRITES = (
    "import json, sys, time; open(sys.argv[1], 'w').write(json.dumps({'n': sys.argv[2]})); print('wrote', sys.argv[2]);"
)


def fake(name: str, then: str = "", *, limit: float = 60.0) -> Step:
    return Step(
        name=name,
        limit=limit,
        command=lambda context: [sys.executable, "-c", WRITES + then, str(context.out / f"{name}.json"), name],
        result=f"{name}.json",
    )


def script(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "launch" / "gpu.sh", *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd="/",
    )


def test_a_step_that_fails_or_hangs_costs_neither_its_own_results_nor_the_others(tmp_path: Path) -> None:
    pages: list[str] = []

    def write_page(content: dict[str, Any]) -> str:
        pages.append(json.dumps({name: step["status"] for name, step in content["steps"].items()}))
        return "page\n"

    began = time.monotonic()
    content = run(
        [
            fake("first"),
            fake("fails", "sys.stderr.write('ValueError: no such thing\\n'); sys.exit(3)"),
            fake(
                "hangs",
                "sys.stderr.write('dpdist: step 3\\nW1128 09:11:54.227383 1 x.cc:9] SIGTERM\\n'); sys.stderr.flush(); "
                "time.sleep(60)",
                limit=5.0,
            ),
            fake("stubborn", "import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)", limit=5.0),
            fake("killed", "import os; os.kill(os.getpid(), 9)"),
            Step(name="silent", limit=60, command=lambda context: ["true"], result="silent.json"),
            fake("last"),
        ],
        out=tmp_path,
        seconds=600,
        write_page=write_page,
    )
    assert time.monotonic() - began < 50  # and not the 60 s that either sleeps
    told = content["steps"]
    assert {name: step["status"] for name, step in told.items()} == {
        "first": "ok",
        "fails": "failed",
        "hangs": "cut off",
        "stubborn": "cut off",
        "killed": "failed",
        "silent": "failed",
        "last": "ok",
    }
    assert told["fails"]["last_line"] == "ValueError: no such thing"
    assert told["hangs"]["last_line"] == "dpdist: step 3"
    assert told["silent"]["last_line"] == "it wrote no result: FileNotFoundError"
    assert told["last"]["last_line"] == "wrote last"
    assert content["results"] == {
        name: {"n": name} for name in ("first", "fails", "hangs", "stubborn", "killed", "last")
    }
    assert json.loads((tmp_path / "gpu.json").read_text()) == content
    assert (tmp_path / "README.md").read_text() == "page\n"
    # Each step is in the files before it begins, as running, with all that are done.
    assert {json.loads(each)["hangs"] for each in pages} == {"not reached", "running", "cut off"}


def test_a_step_gets_what_is_left_and_none_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST", 1.0)
    content = run([fake("long", "time.sleep(60)"), fake("late")], out=tmp_path, seconds=4.5)
    assert content["steps"]["long"]["status"] == "cut off"
    assert content["steps"]["long"]["limit_seconds"] <= 2.5
    assert content["steps"]["late"] == {"status": "no time left"}
    assert content["results"] == {"long": {"n": "long"}}


def test_results_of_an_earlier_run_do_not_pass_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "silent.json").write_text('{"n": "old"}')
    silent = Step(name="silent", limit=60, command=lambda context: ["true"], result="silent.json")
    content = run([silent], out=tmp_path, seconds=60)
    assert content["steps"]["silent"]["status"] == "failed"
    assert content["results"] == {}


def test_a_run_that_is_ended_from_outside_keeps_its_results_and_ends_its_step(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from dpdist_launch.measure.gpu import __main__ as command
from dpdist_launch.measure.gpu.runner import Step
from tests.launch.test_gpu_script import fake
note = "open(sys.argv[1] + '.pid', 'w').write(str(__import__('os').getpid())); time.sleep(60)"
command.steps = lambda tiny: [fake("first"), fake("second", note)]
sys.exit(command.main(["--to", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pid = tmp_path / "second.json.pid"
    try:
        for _ in range(600):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.05)
        child = int(pid.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["status"] for step in content["steps"].values()] == ["ok", "cut off"]
    assert content["results"] == {"first": {"n": "first"}, "second": {"n": "second"}}


def test_the_command_measures_on_a_processor_what_it_measures_on_a_gpu(tmp_path: Path) -> None:
    only = "facts,gamma,roofline,clipping-mnist"
    done = script("--tiny", "--only", only, "--minutes", "30", "--to", str(tmp_path / "new" / "gpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 steps went well" in done.stdout
    content = json.loads((tmp_path / "new" / "gpu" / "gpu.json").read_text())
    assert [step["status"] for step in content["steps"].values()] == ["ok"] * 4
    results = content["results"]
    assert results["facts"]["machine"]["platform"] == "cpu"
    assert results["facts"]["versions"].keys() >= {"jax", "python", "commit"}
    assert results["facts"]["environment"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert {fmt: 0 < loss <= 1 for fmt, loss in results["gamma"]["formats"].items()} == {"bfloat16": True, "tf32": True}
    arms = results["clipping-mnist-cnn-tf32"]["models"]["mnist-cnn"]["arms"]
    assert arms["auto"].keys() >= {"ratio", "examples_per_second", "temp_bytes", "compile_seconds"}
    written = (tmp_path / "new" / "gpu" / "README.md").read_text()
    assert "| mnist-cnn | 8 | tf32 | auto |" in written
    predicted = next(
        row for row in results["roofline"]["rows"] if (row["model"], row["format"]) == ("mnist-cnn", "tf32")
    )
    for arm, way in (("auto", "highest"), ("tensor", "tensor")):
        row = next(x.split(" | ") for x in written.splitlines() if x.startswith(f"| mnist-cnn | 8 | tf32 | {arm} |"))
        assert row[8] == f"{predicted[way]['ratio']:.2f}"
    assert "**A trial**" in written
    shown = (ROOT / "docs/benchmarks.md").read_text()
    told = re.findall(r"^([\w-]+): ok after \d+ s: ", shown, re.M)
    assert told == [step.name for step in steps.steps(tiny=True)]
    assert re.findall(r"^([\w-]+): ok after \d+ s: ", done.stdout, re.M) == [told[i] for i in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--only", "nope"], "there are facts, gamma"), (["--minutes", "0"], "above 0")]
)
def test_bad_input_is_told(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = script(*arguments, "--to", str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_python_that_cannot_be_used_gets_one_line(tmp_path: Path) -> None:
    done = script("--to", str(tmp_path), PYTHON="/nowhere/python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch/gpu.sh needs Python 3.11 or newer; set PYTHON to one (found: /nowhere/python).\n"


def context(tmp_path: Path, results: dict[str, Any], *, tiny: bool = False) -> Context:
    return Context(out=tmp_path, tiny=tiny, seconds=60, results=results)


def test_without_a_gpu_nothing_large_is_tried(tmp_path: Path) -> None:
    on_cpu = {"facts": {"machine": {"platform": "cpu"}}}
    for step in steps.steps(tiny=False)[1:]:
        with pytest.raises(runner.Skip, match="sees no GPU"):
            step.command(context(tmp_path, on_cpu))


def test_a_step_asks_the_results_before_it(tmp_path: Path) -> None:
    by_name = {step.name: step for step in steps.steps(tiny=False)}
    small = {"facts": {"memory_bytes": 16e9, "table_name": None, "machine": {"platform": "gpu"}}}
    line = by_name["clipping-vit-b-bf16"].command(context(tmp_path, small))
    assert line[line.index("--batch") + 1] == "16"  # half of 32
    with pytest.raises(runner.Skip, match="no published rates"):
        by_name["roofline"].command(context(tmp_path, small))


def test_the_page_shows_the_kernels_of_the_row_where_clipping_costs_most() -> None:
    def row(model: str, ratio: float) -> dict[str, Any]:
        kernels = [{"name": f"{model}_{i}", "microseconds": 9.0 - i, "launches": 12.0} for i in range(3)]
        private = {"ratio": ratio, "profile": {"microseconds": 24.0, "launches": 36.0, "kernels": kernels}}
        plain = {"ratio": 1.0, "profile": {"failed": "RuntimeError: no trace"}}
        return {
            "settings": {"format": "bf16"},
            "models": {model: {"batch": 7, "arms": {"sgd": plain, "tensor": private}}},
        }

    rows = {"clipping-a": row("vit-b", 1.2), "clipping-b": row("bert-base", 1.3), "clipping-c": row("r50x1", 1.1)}
    title, about, table = page.profile(rows)
    assert title == "## Profile of the worst row"
    assert "`tensor` of bert-base in bf16, p = 7: 24 us of kernels in a call, 36 launches; plain SGD - us" in about
    assert "| `bert-base_0` | 9 | 12 |" in table
    assert list(page.profile({"clipping-a": {**row("vit-b", 1.2), "models": {}}})) == []


def test_a_result_that_is_not_as_expected_does_not_cost_the_page() -> None:
    content = {
        "started": "then",
        "written": "now",
        "budget_seconds": 600,
        "steps": {"gamma": {"status": "cut off", "seconds": 1.0, "last_line": "a | b"}},
        "results": {"gamma": {"half": True}, "digits": {"undisturbed": {"exit": 0, "seconds": 3.0, "reached": 60}}},
    }
    written = page.page(content)
    assert "| gamma | cut off | 1 | - | a \\| b |" in written
    assert "cannot be shown (KeyError" in written
    assert "| undisturbed | 0 | 3 | 60 | - | - |" in written
