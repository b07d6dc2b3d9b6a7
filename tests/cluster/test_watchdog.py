"""The watchdog, with real processes that are stuck."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

PREAMBLE = """
import sys, threading, time
from dpdist.cluster.watchdog import Watchdog
dog = Watchdog(float(sys.argv[1]), sys.argv[2], "rank 3/8")
"""


def run(program: str, timeout_seconds: float, dump: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREAMBLE + program, str(timeout_seconds), str(dump)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_stuck_process_exits_124_and_says_where(tmp_path: Path) -> None:
    dump = tmp_path / "stacks"
    done = run(
        """
def waits_for_a_lost_rank():
    threading.Event().wait()
threading.Thread(target=lambda: time.sleep(60), name="feed").start()
dog.beat(17)
waits_for_a_lost_rank()
""",
        0.5,
        dump,
    )
    assert done.returncode == 124
    assert done.stderr.count("\n") == 1
    for part in ("rank 3/8", "after step 17", "0.5 s", str(dump)):
        assert part in done.stderr
    assert "waits_for_a_lost_rank" in dump.read_text()
    assert dump.read_text().count("hread 0x") == 4  # main, feed, the watchdog and its writer
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600


def test_a_file_system_that_hangs_does_not_keep_the_watchdog_from_ending_the_process(tmp_path: Path) -> None:
    dump = tmp_path / "stacks"
    os.mkfifo(dump)  # opening it waits for a reader, and there is none
    began = time.monotonic()
    done = run("threading.Event().wait()", 0.3, dump)
    assert done.returncode == 124
    assert "stacks could not be written within 5 s" in done.stderr
    assert 5 < time.monotonic() - began < 15


def test_a_process_stuck_before_its_first_step_is_ended_too(tmp_path: Path) -> None:
    done = run("threading.Event().wait()", 0.3, tmp_path / "stacks")
    assert done.returncode == 124
    assert "before its first step" in done.stderr


def test_beats_keep_a_process_alive(tmp_path: Path) -> None:
    # Twice the timeout in total, a tenth of it between two beats.
    done = run("for step in range(20): dog.beat(step); time.sleep(0.1)", 1.0, tmp_path / "stacks")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "stacks").exists()


def test_allow_gives_a_block_more_time_and_only_the_block(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run(
        """
with dog.allow(30):
    dog.beat(1)
    time.sleep(1.5)
print("compiled", flush=True)
dog.beat(2)
time.sleep(60)
""",
        0.5,
        tmp_path / "stacks",
    )
    assert (done.returncode, done.stdout) == (124, "compiled\n")
    assert time.monotonic() - start < 15


def test_an_allowance_ends_too(tmp_path: Path) -> None:
    done = run("with dog.allow(0.6): time.sleep(60)", 0.1, tmp_path / "stacks")
    assert done.returncode == 124
    assert "0.6 s" in done.stderr


def test_a_stopped_watchdog_ends_nobody(tmp_path: Path) -> None:
    done = run("dog.stop(); time.sleep(0.8); print('done')", 0.3, tmp_path / "stacks")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_dump_that_cannot_be_written_still_ends_the_process(tmp_path: Path) -> None:
    done = run("time.sleep(60)", 0.3, tmp_path / "absent" / "stacks")
    assert done.returncode == 124
    assert "could not be written" in done.stderr


def test_a_process_stuck_in_a_full_pipe_is_ended(tmp_path: Path) -> None:
    """Its main thread holds the lock of sys.stdout: a watchdog that flushed it would be stuck too."""
    program = PREAMBLE + "print('x' * 10_000_000, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "0.5", str(tmp_path / "stacks")],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.wait(timeout=20) == 124
    finally:
        process.kill()
        process.communicate()
