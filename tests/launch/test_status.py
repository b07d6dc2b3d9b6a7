"""`dpdist status`: every state of a run, every kind of directory, and what SLURM says or does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_files import fake_command, first_on_path, write_run

from dpdist_launch.cli import main
from dpdist_launch.observe import queue, snapshot, status, table
from dpdist_launch.observe.queue import Answer, QueuedJob
from dpdist_launch.observe.snapshot import look, state_of

START = {"event": "start", "step": 0, "steps": 100, "nodes": 1, "processes": 1}
RESUME = START | {"event": "resume", "step": 40, "restarts": 1, "after": "preempted"}
PREEMPTED = {"event": "preempted", "step": 40, "saved": True}
FAILED = {"event": "failed", "step": 40, "cause": "OSError (No space left on device)"}
NOBODY = Answer(jobs={})


def waiting(state: str, reason: str | None = None, start: str | None = None) -> QueuedJob:
    return QueuedJob(state=state, reason=reason, start=start, nodes="")


@pytest.mark.parametrize(
    ("state", "known"),
    [
        ("PENDING", {"queued": waiting("PENDING"), "summary": {"status": "preempted"}}),
        ("RUNNING", {"queued": waiting("RUNNING"), "held": True}),
        ("running", {"held": True}),
        ("running", {"held": True, "summary": {"status": "preempted"}}),
        ("finished", {"summary": {"status": "finished"}, "told": [START]}),
        ("finished", {"summary": {"status": "finished"}, "queued": waiting("COMPLETED")}),
        ("failed", {"told": [START, FAILED]}),
        ("preempted", {"told": [START, PREEMPTED]}),
        ("interrupted", {"told": [START, PREEMPTED, RESUME]}),
        ("interrupted", {"begun": True}),
        ("interrupted", {"begun": True, "queued": waiting("NODE_FAIL")}),
        ("interrupted", {"told": [START], "queued": waiting("CANCELLED")}),
        ("preempted", {"summary": {"status": "preempted"}, "queued": waiting("CANCELLED")}),
        ("not begun", {}),
        ("not begun", {"queued": waiting("TIMEOUT")}),
        ("cancelled", {"queued": waiting("CANCELLED")}),
    ],
)
def test_the_state_is_slurms_of_a_job_that_goes_on_and_else_the_runs_own(state: str, known: dict[str, Any]) -> None:
    nothing: dict[str, Any] = {"held": None, "queued": None, "summary": None, "told": [], "begun": False}
    assert state_of(**(nothing | known)) == state


def test_a_lease_tells_whether_a_run_without_slurm_goes_on(tmp_path: Path) -> None:
    for name, alive, state in (("a", True, "running"), ("b", False, "interrupted"), ("c", None, "interrupted")):
        run = write_run(tmp_path / name, step=40, told=[START], alive=alive)
        assert look(run.root, NOBODY).state == state
    foreign = json.loads((tmp_path / "a/private/lease.3").read_text()) | {"host": "elsewhere", "timeout": 60.0}
    lease = tmp_path / "a/private/lease.3"
    lease.write_text(json.dumps(foreign) + "\n")
    assert look(tmp_path / "a", NOBODY).state == "running"
    os.utime(lease, (time.time() - 90, time.time() - 90))
    assert look(tmp_path / "a", NOBODY).state == "interrupted"


def test_everything_that_is_known_of_a_run(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "a", step=40, told=[START, PREEMPTED, RESUME], nodes=["n1", "n1", "n2"], job="17", alive=True
    )
    slurm = Answer(jobs={"17": waiting("RUNNING", start="2026-11-27T08:00:00")})
    seen = look(run.root, slurm)
    assert (seen.state, seen.job, seen.nodes) == ("RUNNING", "17", ["n1", "n2"])
    assert (seen.step, seen.steps, seen.epsilon, seen.target_epsilon) == (40, 100, 0.8, 3.0)
    assert seen.eta == pytest.approx(120, abs=10)
    assert seen.restarts == 1
    assert seen.goodput == {
        "shares": {"start_up": 0.1, "compile": 0, "training": 0.9, "evaluation": 0, "saving": 0, "lost": 0},
        "node_hours": 2.5,
        "queue_hours": 0.017,
    }
    assert seen.error is None


def test_why_a_run_stopped_comes_from_its_events_or_from_its_log(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "a", step=40, told=[START, FAILED])
    assert look(failed.root, NOBODY).error == "OSError (No space left on device)"
    log = tmp_path / "dpdist-17.log"
    log.write_text(
        "0: step 40/100\nsrun: error: n2: task 1: Killed\n"
        "dpdist job: failed (exit code 137): task 1 on n2: Killed; it has saved nothing new\nbye\n"
    )
    for told in ([START], [START, FAILED]):
        killed = write_run(tmp_path / f"b{len(told)}", step=40, told=told, job="17", log=log)
        said = "dpdist job: failed (exit code 137): task 1 on n2: Killed; it has saved nothing new"
        assert look(killed.root, NOBODY).error == said
    log.write_text("srun: error: n2: task 1: Killed\n")
    assert look(tmp_path / "b1", NOBODY).error == "srun: error: n2: task 1: Killed"
    assert look(tmp_path / "b2", NOBODY).error == "OSError (No space left on device)"
    saved = write_run(tmp_path / "c", step=40, status="preempted", told=[START, PREEMPTED], job="17", log=log)
    assert look(saved.root, NOBODY).error is None


def spoiled(root: Path) -> None:
    """A folder with a directory of every kind that is no sound run."""
    write_run(root / "sound", step=100, status="finished", told=[START])
    (root / "foreign").mkdir()
    (root / "foreign/x.txt").write_text("x")
    (root / "begun/private").mkdir(parents=True)
    for name, file, content in (
        ("torn-summary", "summary.json", '{"status": "fin'),
        ("other-summary", "summary.json", "[]"),
        ("ledger", "ledger.jsonl", "garbage\n"),
        ("ledger-cut", "ledger.jsonl", '{"record": "plan", "steps": 1\n'),
        ("binary-metrics", "metrics.jsonl", "\x00\xff\n{}\n[1]\n"),
        ("odd-metrics", "metrics.jsonl", '{"step": 3, "epsilon": "x", "seconds": []}\n{"step": "y"}\n'),
        ("odd-ledger", "ledger.jsonl", '{"record": "plan", "steps_asked": "many", "target_epsilon": "x"}\n'),
        ("odd-summary", "summary.json", '{"status": "failed", "step": "y", "epsilon_spent": [1], "goodput": 3}'),
        ("events", "events.jsonl", "null\n{}\n"),
        ("lease", "private/lease.3", "{}"),
        ("ranks", "private/ranks.json", '{"nodes": 3}'),
        ("goodput", "private/goodput.json", '{"node_seconds": []}'),
        ("job", "private/slurm/job.json", "[]"),
    ):
        run = write_run(root / name, step=40)
        run.jobs.mkdir()
        if name == "odd-summary":
            run.goodput.unlink()
        (run.root / file).write_text(content, encoding="latin-1")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("")


def test_no_directory_takes_the_table_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(tmp_path)
    assert main(["status", str(tmp_path), "--json"]) == 0
    states = {Path(run["path"]).name: run["state"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states == {
        "sound": "finished",
        "foreign": "not a run",
        "begun": "not begun",
        "torn-summary": "broken",
        "other-summary": "broken",
        "ledger": "broken",
        "ledger-cut": "broken",
        "binary-metrics": "interrupted",
        "odd-metrics": "interrupted",
        "odd-ledger": "interrupted",
        "odd-summary": "failed",
        "events": "interrupted",
        "lease": "interrupted",
        "ranks": "interrupted",
        "goodput": "interrupted",
        "job": "interrupted",
    }


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 140])
def test_no_line_is_wider_than_the_terminal(
    tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(tmp_path)
    nodes = [f"node-{n:04}.cluster.example" for n in range(20)]
    long = "a-very-long-name-of-a-run-that-somebody-gave-it-to-tell-what-was-tried"
    write_run(tmp_path / long, step=40, told=[START, FAILED | {"cause": "x" * 400}], nodes=nodes)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(width, 100)
    assert lines[0].split()[:2] == ["RUN", "STATE"]
    if width >= 100:
        assert lines[0].split() == ["RUN", "STATE", "STEP", "EPSILON", "ETA", "RESTARTS", "GOODPUT", "NODES"]
        assert any("node-0000 +19" in line for line in lines)


def test_even_an_error_that_nobody_thought_of_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", step=40)
    monkeypatch.setattr(snapshot, "_is_held", lambda run: 1 / 0)
    seen = look(run.root, NOBODY)
    assert (seen.state, seen.reason) == ("broken", "cannot be understood (ZeroDivisionError)")


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\x1b[31m\nb").mkdir()
    assert main(["status", str(tmp_path)]) == 0
    assert "a?[31m?b" in capsys.readouterr().out


def test_folders_of_runs_within_a_folder_are_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "single", step=100, status="finished")
    write_run(tmp_path / "sweep/lr-1", step=40)
    write_run(tmp_path / "sweep/lr-2", step=20)
    (tmp_path / "sweep/private").mkdir()  # of its jobs' files
    (tmp_path / "sweep/sweep.json").write_text("{}")
    assert main(["status", str(tmp_path)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["RUN", "single", "sweep/lr-1", "sweep/lr-2"]
    assert main(["status", str(tmp_path / "sweep")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["RUN", "lr-1", "lr-2"]


def test_the_default_is_runs_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "DIR = 'runs': there is no such directory" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    write_run(tmp_path / "runs/a", step=40)
    assert main(["status"]) == 0
    assert "a         interrupted" in capsys.readouterr().out


def test_slurm_is_asked_once_for_all_jobs_and_a_waiting_one_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs/a", step=40, told=[START, PREEMPTED], job="17")
    write_run(tmp_path / "runs/b", step=40, told=[START], job="18")
    say = "17|PENDING|Priority|2026-11-27T14:30:00|\\n18|NODE_FAIL|NonZeroExitCode|2026-11-27T08:00:00|n1\\n"
    fake_command(tmp_path / "bin", "squeue", f'echo "$@" >> {tmp_path}/asked; printf "{say}"')
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    assert main(["status", str(tmp_path / "runs")]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert re.match(r"a +PENDING", lines[1])
    assert lines[2] == "job 17 waits: Priority; expected to start 2026-11-27 14:30:00"
    assert re.match(r"b +interrupted", lines[3])
    assert lines[4] == "SLURM says NODE_FAIL"
    asked, waiting = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=17,18" in asked
    assert "--me --states=PENDING,CONFIGURING,RUNNING,REQUEUED" in waiting


def test_what_became_of_a_job_that_never_began_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, job in (("a", 17), ("b", 18), ("c", 19)):
        (tmp_path / "runs" / name / "private/slurm").mkdir(parents=True)
        (tmp_path / "runs" / name / "private/slurm/job.json").write_text(json.dumps({"job": str(job)}))
    write_run(tmp_path / "runs/d", step=40, status="preempted", told=[START, PREEMPTED], job="20")
    say = "17|CANCELLED|None|N/A|\\n20|CANCELLED|None|N/A|\\n"
    fake_command(tmp_path / "bin", "squeue", f'printf "{say}"')
    told = "18|CANCELLED by 1000\\n18_1|FAILED\\n"
    fake_command(tmp_path / "bin", "sacct", f'echo "$@" >> {tmp_path}/asked; printf "{told}"')
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    assert main(["status", str(tmp_path / "runs"), "--json"]) == 0
    cancelled = "its job was cancelled before the run began"
    assert [(run["state"], run["reason"]) for run in json.loads(capsys.readouterr().out)["runs"]] == [
        ("cancelled", cancelled),
        ("cancelled", cancelled),
        ("not begun", None),
        ("preempted", "SLURM says CANCELLED"),
    ]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=18,19" in asked


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60", "SLURM gave no answer within 1 s"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
    ],
)
def test_a_controller_that_is_away_holds_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    for name in "abcdef":
        write_run(tmp_path / "runs" / name, step=40, told=[START], job=str(ord(name)), alive=True)
    fake_command(tmp_path / "bin", "squeue", script)
    monkeypatch.setenv("PATH", first_on_path(tmp_path / "bin"))
    monkeypatch.setattr(queue.ask, "__kwdefaults__", {"patience": 1.0})
    began = time.monotonic()
    assert main(["status", str(tmp_path / "runs")]) == 0
    assert time.monotonic() - began < 5
    out = capsys.readouterr().out
    assert out.count("running") == 6
    assert reason in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith("states are the runs' own: ")


def test_the_details_of_a_run_are_its_time_and_its_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", step=40, told=[START, FAILED])
    assert main(["status", str(tmp_path / "a"), "--detail"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"training steps +2:15:00 +90.0%\n +of it waiting for stragglers \(private\) +1:21 +0.9%", text)
    assert re.search(r"in the queue \(holds no node\) +1:00\n", text)
    assert "2026-11-27T07:00:00Z  failed     step 40, cause OSError (No space left on device)" in text


def test_watching_draws_again_and_ends_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", step=40)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=pause))
    assert main(["status", str(tmp_path), "--watch", "7"]) == 0
    assert pauses == [7.0] * 3
    assert capsys.readouterr().out.count("interrupted") == 3
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch = 0.0: give the seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3.21, "3.2 s"), (59.96, "60.0 s"), (75, "1:15"), (3600, "1:00:00"), (86399, "23:59:59"), (200_000, "2d 07:33")],
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert table.clock(seconds) == shown


def test_it_answers_at_once_without_jax_or_numpy(tmp_path: Path) -> None:
    write_run(tmp_path / "a", step=40)
    code = (
        "import sys, dpdist_launch.cli as c\n"
        f"assert c.main(['status', {str(tmp_path)!r}]) == 0\n"
        "print([name for name in ('jax', 'numpy', 'submitit', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "dpdist_launch", "status", str(tmp_path)], check=True, timeout=60)
        times.append(time.monotonic() - began)
    assert min(times) < 0.5
