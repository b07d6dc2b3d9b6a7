"""The lanes hold every test, and a run in lanes passes only where every test of every lane did."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lanes
import pytest
from jobs import wait_for

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests/support"
CONFTEST = """
import lanes, progress
def pytest_configure(config): progress.register(config)
def pytest_collection_modifyitems(items): lanes.mark(items)
"""


def test_every_test_file_has_a_lane_and_every_entry_stands_for_something() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert [file for file in files if lanes.lane_of(file) is None] == []
    for entry in lanes.LANES:
        path, _, test = entry.partition("::")
        assert (ROOT / path).exists(), entry
        names = (
            {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}
            if test
            else {""}
        )
        assert test in names, entry


def test_the_longest_entry_decides() -> None:
    assert lanes.lane_of("tests/mechanism/test_new.py") == lanes.COMPUTE
    assert lanes.lane_of("tests/mechanism/test_keys.py::test_a[1]") == lanes.FAST
    assert lanes.lane_of("tests/test_cli.py::test_questions_are_answered_without_starting_jax") == lanes.WAIT
    assert lanes.lane_of("tests/test_cli.py::test_questions_are_answered_without_starting_jax_at_all") == lanes.FAST
    assert lanes.lane_of("tests/nowhere/test_new.py") is None


class House:
    """A repository of its own, with a file of tests for each lane of a full run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tests/support").mkdir(parents=True)
        for name in ("run_lanes.py", "lanes.py", "progress.py"):
            shutil.copy(SUPPORT / name, root / "tests/support")
        (root / "tests/conftest.py").write_text(CONFTEST)
        markers = "".join(f'    "{name}",\n' for name in lanes.NAMES)
        (root / "pyproject.toml").write_text(
            '[tool.pytest.ini_options]\naddopts = "-q --strict-markers"\npythonpath = ["tests/support"]\n'
            f"markers = [\n{markers}]\n"
        )
        for folder in ("mechanism", "models", "trainer", "slurm"):
            (root / "tests" / folder).mkdir()
        self.compute, self.wait = root / "tests/mechanism/test_a.py", root / "tests/trainer/test_b.py"
        (root / "tests/slurm/test_h.py").write_text("def test_h(): pass\n")
        (root / "tests/models/test_m.py").write_text("def test_m(): pass\n")
        self.compute.write_text("def test_a(): pass\n\ndef test_b(): pass\n")
        self.wait.write_text("import pytest\n\ndef test_c(): pass\n\n@pytest.mark.skip\ndef test_d(): pass\n")

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DPDIST_"))}
        return subprocess.Popen(
            [sys.executable, str(self.root / "tests/support/run_lanes.py"), *arguments],
            env=kept | {"TMPDIR": str(self.root)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environ)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


def test_all_lanes_pass_and_the_last_line_has_the_sum(house: House) -> None:
    done = house.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"===== 5 passed, 1 skipped in [\d.]+s =====", last_line(done))
    assert "slowest of compute:" in done.stdout
    assert "tests.trainer.test_b::test_c" in done.stdout


@pytest.mark.parametrize(
    ("body", "said", "summary"),
    [
        ("def test_a(): assert 1 == 2\ndef test_b(): pass\n", "code 1", "1 failed, 4 passed, 1 skipped"),
        ("import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 9)\n", "code -9", "3 passed, 1 skipped"),
        ("import os\ndef test_a(): pass\ndef test_b(): os._exit(0)\n", "no results", "3 passed, 1 skipped"),
        ("", "code 5", "3 passed, 1 skipped"),
        ("def test_a(: pass\n", "code 2", "4 errors"),  # every lane collects all and selects
    ],
    ids=["a failure", "killed half-way", "ended half-way as if well", "no tests", "not collected"],
)
def test_a_lane_that_did_not_come_to_a_good_end_fails_the_run(house: House, body: str, said: str, summary: str) -> None:
    house.compute.write_text(body)
    done = house.run()
    assert done.returncode == 1
    assert "lane compute FAILED: " in done.stdout
    assert said in done.stdout
    assert last_line(done).startswith(f"===== {summary}, {4 if 'errors' in summary else 1} of 4 lanes FAILED in ")


def test_a_lane_that_takes_too_long_is_ended_and_fails(house: House) -> None:
    house.wait.write_text("import time\ndef test_c(): time.sleep(100)\n")
    done = house.run(DPDIST_LANE_MINUTES="0.05", DPDIST_LANE_INTERVAL="1")
    assert done.returncode == 1
    assert "lane wait is ended after 0.05 minutes" in done.stdout


def test_it_shows_what_a_lane_is_about_and_told_to_end_it_ends_every_lane_and_does_not_pass(house: House) -> None:
    begun = house.root / "begun"
    house.wait.write_text(
        f"import pathlib, time\ndef test_c():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(300)\n"
    )
    process = house.start(DPDIST_LANE_INTERVAL="0.2")
    assert process.stdout is not None
    assert any("wait 0/1 (tests/trainer/test_b.py::test_c)" in line for line in iter(process.stdout.readline, ""))
    wait_for(begun.exists)  # what ends pytest between its own lines may be swallowed, or take another code
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=400)  # beside eighty processes, a lane that is nice gets next to nothing
    assert process.returncode == 1
    assert "lane wait FAILED: pytest ended with code 2" in out


def test_a_test_without_a_lane_or_with_two_is_an_error_that_names_it(house: House) -> None:
    (house.root / "tests/nowhere").mkdir()
    (house.root / "tests/nowhere/test_e.py").write_text("def test_e(): pass\n")
    house.wait.write_text("import pytest\n\n@pytest.mark.fast\n@pytest.mark.wait\ndef test_c(): pass\n")
    done = house.run()
    assert done.returncode == 1
    assert "tests/nowhere/test_e.py::test_e: no lane" in done.stdout
    assert "tests/trainer/test_b.py::test_c: fast and wait" in done.stdout


def test_fast_runs_the_files_of_the_fast_lane_alone(house: House) -> None:
    fast = house.root / "tests/mechanism/test_keys.py"
    fast.write_text("import pytest\n\ndef test_f(): pass\n\n@pytest.mark.wait\ndef test_g(): assert False\n")
    done = house.run("fast")
    assert done.returncode == 0, done.stdout
    assert last_line(done).startswith("===== 1 passed in ")
