"""Ctrl-C in a run of one process: it saves and says how to go on; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import time

from jobs import STEPS, Jobs, Run, Running, wait_for

#: In a shell's background, where tests may run, Python would find SIGINT ignored.
AS_ON_A_TERMINAL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from dpdist_launch.cli import main; sys.exit(main(sys.argv[1:]))"
)


def train(jobs: Jobs, run: Run, **environ: str) -> Running:
    argv = ["train", str(jobs.config), "data.prefetch=1", "--run-dir", str(run.root)]
    return jobs.program([sys.executable, "-c", AS_ON_A_TERMINAL, *argv], **environ)


def test_the_first_saves_and_the_same_command_goes_on_to_the_same_bits(jobs: Jobs, single: Run) -> None:
    run = jobs.new("ctrl-c")
    running = train(jobs, run, PACE="0.3")
    running.wait_for_step(run, 5)
    os.kill(running.pid, signal.SIGINT)
    ended = running.wait()
    step = run.summary["step"]
    assert ended.code == 75, ended.err
    assert (run.summary["status"], run.checkpoints[-1]) == ("preempted", step)
    assert 5 < step < STEPS
    assert "leaving after this step, and saving; Ctrl-C again ends it at once" in ended.err
    assert f"dpdist: step {step} is saved: the same command again goes on from there" in ended.err
    assert "Traceback" not in ended.err
    again = jobs.train(run).wait()
    assert again.code == 0, again.err
    assert f"going on from step {step} of {STEPS}: the part before was told to leave there" in again.err
    assert run.charged == list(range(STEPS))
    assert run.summary["params_sha256"] == single.summary["params_sha256"]


def test_a_second_one_ends_it_at_once_and_what_was_saved_stays(jobs: Jobs) -> None:
    run = jobs.new("ctrl-c-twice")
    pace = jobs.root / "pace"
    pace.write_text("0.2")
    running = train(jobs, run, PACE=str(pace))
    running.wait_for_step(run, 5)
    wait_for(lambda: run.checkpoints[-1] >= 4)
    pace.write_text("20")  # a step that nobody wants to wait for
    time.sleep(0.5)
    os.kill(running.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in running.stderr.read_text())
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(10).code == -signal.SIGINT
    pace.unlink()
    again = jobs.train(run).wait()
    assert again.code == 0, again.err
    assert f"of {STEPS}: the part before was cut short, and this is its newest checkpoint" in again.err
