"""`dpdist logs`: where each way of starting a run leaves its log, whose line is whose, and what is noise."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_files import fake_command, first_on_path, write_run

from dpdist_launch import noise
from dpdist_launch.cli import main
from dpdist_launch.noise import NOISE, is_noise
from dpdist_launch.observe.sources import Source, find, split
from dpdist_launch.slurm.script import setup

GLOO = NOISE[0].example
PLACES = ["n1", "n1", "n2", "n2"]


@pytest.mark.parametrize("kind", NOISE, ids=lambda kind: kind.pattern[:40])
def test_every_kind_of_noise_is_left_out_by_its_own_pattern(kind: noise.Noise) -> None:
    assert re.fullmatch(kind.pattern, kind.example)
    assert [other for other in NOISE if re.fullmatch(other.pattern, kind.example)] == [kind]


@pytest.mark.parametrize(
    "line",
    [
        "[Gloo] Rank [Gloo] Rank 21 is connected to  is connected to 33 peer ranks.  peer ranks. "
        "Expected number of connected peer ranks is : 3Expected number of connected peer ranks is : 3",
        " peer ranks. Expected number of connected peer ranks is : 3",
    ],
)
def test_lines_that_ranks_have_torn_are_noise_too(line: str) -> None:
    assert is_noise(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "3",
        "dpdist: error: data.path = 'd': does not exist.",
        f"dpdist: {GLOO}",
        f"{GLOO} dpdist: failed: the save of step 4 failed",
        "Traceback (most recent call last):",
        '  File "/x/dpdist/trainer.py", line 200, in loop',
        "RuntimeError: [Gloo] Rank 1 is connected to nobody: Connection closed by peer",
        "watchdog: rank 1/4 made no progress for 30 s after step 4; stacks of all threads: x",
        "srun: error: n2: task 3: Killed",
        "E0000 00:00:1764230571.201482    7101 cuda_dnn.cc:522] Loaded runtime CuDNN library: 9.1.0 but source was "
        "compiled with: 9.8.0.",
        "2025-05-14 10:34:02.197166: E external/xla/xla/status.cc:86] OUT_OF_RANGE: Delay kernel timed out",
        "WARNING dpdist.cluster.join: jax_enable_x64 is True in this environment; training sets it to False",
    ],
)
def test_no_line_of_ours_and_no_error_is_noise(line: str) -> None:
    assert not is_noise(line)


@pytest.mark.parametrize(
    ("line", "rank", "text"),
    [
        ("3: step 4/8", 3, "step 4/8"),
        (" 3: step 4/8", 3, "step 4/8"),
        ("03: 12: a", 3, "12: a"),
        ("[17] step", 17, "step"),
        ("0: ", 0, ""),
        ("srun: error: n2: task 3: Killed", None, "srun: error: n2: task 3: Killed"),
        ("dpdist job: done", None, "dpdist job: done"),
        ("[Gloo] Rank 1", None, "[Gloo] Rank 1"),
        ("2026-11-27 08:00:00 x", None, "2026-11-27 08:00:00 x"),
    ],
)
def test_the_label_in_front_names_the_rank(line: str, rank: int | None, text: str) -> None:
    assert split(line) == (rank, text)


def test_of_a_batch_script_the_one_log_is_split_by_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "dpdist-17.log"
    log.write_text(f"+ job 17\n0: step 4/8\n3: {GLOO}\n3: hello\n1: other\nsrun: error: n2: task 3: Killed\n3: bye")
    run = write_run(tmp_path / "run", step=4, job="17", log=log, nodes=PLACES)
    assert find(run) == [Source(log, None)]
    assert main(["logs", str(run.root), "--rank", "3"]) == 0
    told = capsys.readouterr()
    assert told.out == "hello\nbye\n"
    assert told.err == f"rank 3 = n2 local 1\nlog: {log}\n"
    assert main(["logs", str(run.root), "--rank", "3", "--all-noise"]) == 0
    assert capsys.readouterr().out == f"{GLOO}\nhello\nbye\n"
    assert main(["logs", str(run.root)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "+ job 17", "[0] step 4/8", "[3] hello", "[1] other", "srun: error: n2: task 3: Killed", "[3] bye",
    ]  # fmt: skip
    assert told.err.splitlines()[:2] == [
        "rank 0 = n1 local 0, rank 1 = n1 local 1",
        "rank 2 = n2 local 0, rank 3 = n2 local 1",
    ]


def test_of_a_submitted_job_each_rank_has_a_file_and_the_newest_job_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", step=4, job="17", log=tmp_path / "17_0_log.err", nodes=PLACES)
    run.jobs.mkdir()
    (run.jobs / "job.json").write_text(json.dumps({"job": "18"}))
    for job in (17, 18):
        for rank in range(12):
            (run.jobs / f"{job}_{rank}_log.err").write_text(f"job {job}, rank {rank}\n")
            (run.jobs / f"{job}_{rank}_log.out").write_text(f"{GLOO}\nprinted\n")
    (run.jobs / "18_submission.sh").write_text("")
    assert [source.rank for source in find(run)] == [rank for rank in range(12) for _ in range(2)]
    assert main(["logs", str(run.root), "--rank", "2"]) == 0
    assert capsys.readouterr().out == "job 18, rank 2\nprinted\n"
    assert main(["logs", str(run.root)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[:3] == ["[0] job 18, rank 0", "[0] printed", "[1] job 18, rank 1"]
    assert told.err.splitlines()[2:] == [f"log: {run.jobs}"]


def test_of_processes_started_here_the_copy_of_their_output_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", step=4, nodes=["laptop"] * 2)
    (run.logs / "rank-0.log").write_text("logged\n")
    assert main(["logs", str(run.root)]) == 0
    assert capsys.readouterr().out == "[0] logged\n"
    run.output.write_text(f"[0] step 4/8\n[1] {GLOO}\n[1] hello\n")
    assert main(["logs", str(run.root), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_slurm_names_the_log_where_the_run_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "slurm-17.out"
    log.write_text("0: hello\n")
    run = write_run(tmp_path / "run", step=4, job="17")
    fake_command(tmp_path / "bin", "scontrol", f'echo "JobId=17 JobState=RUNNING StdErr={log} StdIn=/dev/null"')
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    assert find(run) == [Source(log, None)]


def test_what_cannot_be_shown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", step=4, nodes=PLACES)
    for argv, said in (
        (["logs", str(run.root), "--rank", "4"], "--rank = 4: this run has the ranks 0 to 3."),
        (["logs", str(run.root)], "has no log: what a process prints that is started by hand is on its terminal."),
        (["logs", str(tmp_path)], "holds no run"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err


def test_it_follows_until_the_run_has_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", step=4, alive=True, nodes=["laptop"] * 2)
    run.output.write_text("[0] one\n")
    command = [sys.executable, "-m", "dpdist_launch", "logs", str(run.root), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == "[0] one\n"
        with run.output.open("a") as file:
            file.write("[1] tw")
            file.flush()
            time.sleep(1)
            file.write("o\n[1] three")
        assert following.stdout.readline() == "[1] two\n"
        (run.private / "lease.3").unlink()
        assert following.stdout.read() == "[1] three\n"
        assert following.wait(30) == 0


def test_submitit_says_what_fails_once_and_nothing_else() -> None:
    code = (
        "import logging; from submitit.core.logger import get_logger\n"
        "get_logger().info('at first')\nlogging.basicConfig(level=logging.WARNING)\n"
        "get_logger().info('it is well')\nget_logger().error('it failed')"
    )
    exports = [line for line in setup(None, []) if line.startswith("export SUBMITIT")]
    command = ["bash", "-c", "\n".join([*exports, f"{sys.executable} -c {shlex.quote(code)} 2>&1"])]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.splitlines() == ["ERROR:submitit:it failed"]
