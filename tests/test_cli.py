"""The `dpdist` command where it needs no run: privacy questions, help, and numbers that make no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import dpdist
from dpdist_launch.cli import main

PLAN = ("--sampling-probability", "0.01", "--steps", "1000", "--delta", "1e-5")


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    return json.loads(printed.out)


def test_privacy_epsilon_prints_what_a_plan_costs(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "privacy", "epsilon", *PLAN, "--noise-multiplier", "1.0")
    assert set(found) >= {"epsilon", "delta", "epsilon_rdp", "accountant"}
    assert found["delta"] == 1e-5
    assert found["noise_multiplier"] == 1.0
    assert found["sampling_probability"] == 0.01
    assert found["steps"] == 1000
    assert found["accountant"] in ("pld", "rdp")
    # dp-accounting's tight answer for this plan is 1.83; Abadi et al.'s moments accountant says about 2.1.
    assert 1.7 < found["epsilon"] <= found["epsilon_rdp"] < 2.3


def test_privacy_calibrate_finds_the_least_noise_for_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "privacy", "calibrate", *PLAN, "--target-epsilon", "3.0")
    assert set(found) >= {"noise_multiplier", "epsilon"}
    assert found["epsilon"] <= 3.0
    sigma = found["noise_multiplier"]
    same = answer(capsys, "privacy", "epsilon", *PLAN, "--noise-multiplier", repr(sigma))
    less = answer(capsys, "privacy", "epsilon", *PLAN, "--noise-multiplier", repr(sigma - 1e-3))
    assert same["epsilon"] == found["epsilon"]
    assert less["epsilon"] > 3.0


def plan(**changes: str) -> list[str]:
    values = {"sampling-probability": "0.01", "steps": "10", "delta": "1e-5"} | changes
    return [part for name, value in values.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["epsilon", *plan(**{"noise-multiplier": "0"})], "noise multiplier must be positive"),
        (["epsilon", *plan(**{"noise-multiplier": "nan"})], "noise multiplier must be positive"),
        (["epsilon", *plan(**{"noise-multiplier": "1", "delta": "0"})], "delta must be in (0, 1)"),
        (["epsilon", *plan(**{"noise-multiplier": "1", "delta": "nan"})], "delta must be in (0, 1)"),
        (["epsilon", *plan(**{"noise-multiplier": "1", "sampling-probability": "1.5"})], "sampling probability"),
        (["epsilon", *plan(**{"noise-multiplier": "1", "sampling-probability": "0"})], "sampling probability"),
        (["epsilon", *plan(**{"noise-multiplier": "1", "steps": "-1"})], "steps must be"),
        (["calibrate", *plan(**{"target-epsilon": "-1"})], "target epsilon must be positive"),
        (["calibrate", *plan(**{"target-epsilon": "1e9"})], "no real privacy"),
        (["calibrate", *plan(**{"target-epsilon": "1", "steps": "0"})], "steps"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["privacy", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dpdist: error: ")
    assert words in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "argv",
    [
        ["privacy", "epsilon", "--steps", "10"],
        ["privacy", "epsilon", *PLAN, "--noise-multiplier", "much"],
        ["privacy"],
        ["fly"],
        ["train"],
        ["train", "configs/digits.yaml", "--procesess", "2"],
        ["train", "configs/digits.yaml", "--processes", "two"],
        ["train", "configs/digits.yaml", "--run-dir", "x", "stray"],
        [],
    ],
)
def test_a_command_line_that_cannot_be_read_exits_with_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: dpdist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "'trian'; did you mean train? there are train, submit, "),
        (["privacy", "calibrat"], "'calibrat'; did you mean calibrate? there are epsilon, calibrate"),
        (["scaling", "x.yaml", "--cluster", "Slrm"], "'Slrm'; did you mean slurm? there are slurm, local"),
        (["fly"], "'fly'; there are train, "),
    ],
)
def test_a_misspelled_command_is_answered_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert words in capsys.readouterr().err


def test_overrides_may_stand_on_either_side_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    """The error shows that the override after the option was read."""
    assert main(["train", "configs/digits.yaml", "run.log_every=5", "--processes", "2", "training.stepz=3"]) == 2
    assert "training.stepz = 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ("train", "privacy", "bench", "settings", "--version")),
        (["settings"], ("PATTERN", "--json", "--markdown")),
        (["train"], ("CONFIG", "key=value", "--run-dir", "--processes", "75", "preempted", "2 bad input")),
        (["plan"], ("CONFIG", "key=value", "--nodes", "--gpus-per-node", "--json")),
        (["tune"], ("CONFIG", "--space", "--trials", "--distribution", "--run-dir", "--target-epsilon", "--at-most")),
        (["privacy"], ("epsilon", "calibrate")),
        (["privacy", "epsilon"], ("--noise-multiplier", "--sampling-probability", "--steps", "--delta")),
        (["privacy", "calibrate"], ("--target-epsilon",)),
        (["scaling"], ("CONFIG", "--nodes", "--arms", "sgd-sync-every-batch", "--collect", "--to", "75 interrupted")),
        (["bench"], ("step",)),
        (["bench", "step"], ("CONFIG", "--steps", "--to")),
    ],
)
def test_help_tells_what_there_is(capsys: pytest.CaptureFixture[str], argv: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed


def test_questions_are_answered_without_starting_jax() -> None:
    """`python -m launch` is the same command; help must not wait for an import of seconds."""
    code = "import sys, dpdist_launch.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    result = subprocess.run(
        [sys.executable, "-m", "launch", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "usage: dpdist" in result.stdout


#: What only other commands need, process 0, or some configs; each would cost every rank of a job 10 to 500 ms.
NOT_OF_A_RANK = {"dp_accounting", "matplotlib", "pandas", "pyarrow", "PIL", "scipy", "sklearn", "submitit", "torch"}


def test_a_rank_imports_no_other_command_and_nothing_that_process_0_needs_alone() -> None:
    code = (
        "import sys, dpdist_launch.cli as c\ntry: c.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(*[m for m in sys.modules if m.startswith('dpdist_launch')])\n"
        "import dpdist_launch.training\nprint(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours, everything = (set(line.split()) for line in result.stdout.splitlines()[-2:])
    assert ours == {"dpdist_launch", "dpdist_launch.cli", "dpdist_launch.ending"}
    assert "dpdist.trainer" in everything
    assert {name.split(".")[0] for name in everything} & NOT_OF_A_RANK == set()


def test_the_version_is_that_of_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dpdist {dpdist.__version__}\n" == f"dpdist {metadata.version('dpdist')}\n"

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert dpdist.__version__ == project["version"]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """`dpdist` stands for this Python's; buffered as users have it."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = f'set -o pipefail; dpdist() {{ "{sys.executable}" -m launch "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, env=environ)


def test_errors_stay_off_stdout_where_stderr_is_closed() -> None:
    ended = shell("dpdist settings zzz 2>&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


def test_a_closed_stdout_is_no_failure_and_a_full_one_is_told_in_one_line() -> None:
    ended = shell("dpdist settings >&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    ended = shell("dpdist settings clip_norm >/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "dpdist: error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize(("pattern", "code"), [("", 1), ("clip_norm", 0)], ids=["much", "little"])
def test_a_reader_may_leave_early(pattern: str, code: int) -> None:
    """Not all of what is longer than a buffer could be printed."""
    ended = shell(f"dpdist settings {pattern} | true")
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    """What a library logs to descriptor 2 would go into it."""
    code = (
        "import os, sys\nfrom dpdist.cluster.streams import open_missing_streams\nopen_missing_streams()\n"
        f"ledger = open({str(tmp_path / 'ledger')!r}, 'w')\nos.write(2, b'W0000 noise')\nos.write(1, b'noise')\n"
        "print('to nobody'), print('to nobody', file=sys.stderr), sys.stdin.read()\n"
        "ledger.write(str(ledger.fileno() > 2)), ledger.close(), os.execlp('sh', 'sh', '-c', 'echo x >&2 && exit 7')\n"
    )
    ended = subprocess.run(["sh", "-c", f"exec '{sys.executable}' -c \"$0\" <&- >&- 2>&-", code], timeout=60)
    assert ended.returncode == 7  # what it has become writes to stderr too
    assert (tmp_path / "ledger").read_text() == "True"


def test_dpdist_train_is_the_function_whatever_was_imported_before() -> None:
    code = "import dpdist.trainer, dpdist_launch.training, dpdist; print(dpdist.train.__name__, callable(dpdist.train))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "train True\n"
