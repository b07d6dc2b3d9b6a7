"""The local launcher, with small programs in place of training."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpdist.errors import InputError
from dpdist_launch import local
from dpdist_launch.local import run_local, run_part

#: What the ranks run: the program is an argument, as `train CONFIG` would be.
PYTHON = (sys.executable, "-c")
RANK = "import os, signal, sys, time; rank = int(os.environ['DPDIST_PROCESS_ID']);"
#: A rank that, like JAX, takes SIGTERM for a notice, and needs a moment to save.
SAVES = """
import os, signal, sys, time
rank = os.environ["DPDIST_PROCESS_ID"]
noticed = []
signal.signal(signal.SIGTERM, lambda *_: noticed.append(1))
signal.signal(signal.SIGINT, lambda *_: print("INTERRUPTED", flush=True))
print("ready", os.getpid(), flush=True)
for _ in range(1000):
    if noticed:
        break
    time.sleep(0.02)
time.sleep(float(sys.argv[1]))
print("saved", flush=True)
sys.exit(75)
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE", 1.0)


def run(program: str, processes: int, *arguments: str, **environ: str) -> int:
    return run_local([program, *arguments], processes, None, {**os.environ, **environ}, program=PYTHON)


def start_launcher(program: str, processes: int, *arguments: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own, for tests that signal or kill it."""
    code = (
        "import sys; from dpdist_launch.local import run_local;"
        f"sys.exit(run_local(sys.argv[1:], {processes}, None, program={PYTHON!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, program, *arguments],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_ready(launcher: subprocess.Popen[str], processes: int) -> list[int]:
    """The process ids of the ranks, once all have said that they are ready."""
    assert launcher.stdout is not None
    return [int(launcher.stdout.readline().split()[-1]) for _ in range(processes)]


def finish(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return launcher.communicate(timeout=20)
    finally:
        launcher.kill()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_every_line_is_labelled_and_whole(capfd: pytest.CaptureFixture[str]) -> None:
    # All at the same moment, so that the forwarding threads really compete.
    program = (
        RANK
        + """
out = "".join(f"{rank}:{i}:{'x' * 200}\\n" for i in range(1000)) + "no newline at the end"
err = "".join(f"{rank}:{i}!\\n" for i in range(1000))
time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
sys.stdout.write(out)
sys.stderr.write(err)
"""
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # Threads take turns as often as they can.
    try:
        assert run(program, 4, str(time.time() + 1)) == 0
    finally:
        sys.setswitchinterval(interval)
    out, err = capfd.readouterr()
    expected = [f"[{rank}] {rank}:{i}:{'x' * 200}" for rank in range(4) for i in range(1000)]
    expected += [f"[{rank}] no newline at the end" for rank in range(4)]
    assert sorted(out.splitlines()) == sorted(expected)
    assert sorted(err.splitlines()) == sorted(f"[{rank}] {rank}:{i}!" for rank in range(4) for i in range(1000))


def test_lines_come_while_the_ranks_run() -> None:
    start = time.monotonic()
    launcher = start_launcher("print('first'); import time; time.sleep(12)", 1)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "[0] first\n"
    assert time.monotonic() - start < 10
    launcher.kill()
    finish(launcher)


def test_each_process_is_told_who_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    names = "('DPDIST_PROCESS_ID', 'DPDIST_NUM_PROCESSES', 'DPDIST_COORDINATOR')"
    assert run(f"import os; print(*[os.environ[n] for n in {names}])", 3) == 0
    lines = sorted(line.split() for line in capfd.readouterr().out.splitlines())
    assert [line[:3] for line in lines] == [[f"[{rank}]", str(rank), "3"] for rank in range(3)]
    coordinators = {line[3] for line in lines}
    assert len(coordinators) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+", coordinators.pop())


def test_the_program_is_the_command_line_of_this_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local(["--help"], 1, None) == 0
    assert "train" in capfd.readouterr().out


@pytest.mark.parametrize("processes", [0, -1])
def test_a_number_of_processes_that_cannot_be_is_refused(processes: int) -> None:
    with pytest.raises(InputError, match="--processes"):
        run("", processes)


def test_the_first_failure_ends_all_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert run(RANK + "time.sleep(0.3); sys.exit(3) if rank == 1 else time.sleep(60)", 3) == 3
    assert time.monotonic() - start < 15
    assert "launcher: rank 1 of 3 exited with code 3" in capfd.readouterr().err


def test_a_later_failure_does_not_hide_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    """When the coordinator exits, JAX aborts the others: they are not the cause."""
    assert run(RANK + "time.sleep(0.2 + rank / 2); sys.exit(2) if rank == 0 else os.abort()", 2) == 2
    err = capfd.readouterr().err
    assert "rank 0 of 2 exited with code 2" in err
    assert err.count("launcher:") == 1


def test_a_rank_ended_by_a_signal_is_named_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    program = RANK + "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)"
    assert run(program, 2) == 128 + signal.SIGKILL
    assert "rank 0 of 2 was ended by SIGKILL" in capfd.readouterr().err


def test_others_may_report_their_side_before_they_are_killed(capfd: pytest.CaptureFixture[str]) -> None:
    program = RANK + "sys.exit(1) if rank == 0 else (time.sleep(0.3), print('peer is gone'), time.sleep(60))"
    assert run(program, 2) == 1
    assert "[1] peer is gone" in capfd.readouterr().out


def test_failing_ranks_are_not_sent_sigterm(capfd: pytest.CaptureFixture[str]) -> None:
    """JAX would take it for a preemption notice, save, and exit as if all were well."""
    program = (
        RANK
        + """
signal.signal(signal.SIGTERM, lambda *_: print("NOTICE", flush=True))
time.sleep(0.5)
sys.exit(1) if rank == 0 else time.sleep(60)
"""
    )
    assert run(program, 2) == 1
    assert "NOTICE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0, 0), 0), ((0, 75, 0), 75), ((75, 75, 75), 75), ((75, 75, 1), 1), ((0, 0, 124), 124)]
)
def test_the_code_of_the_job(codes: tuple[int, ...], code: int) -> None:
    assert run(RANK + f"sys.exit({codes}[rank])", 3) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_is_a_notice_to_every_rank(number: signal.Signals) -> None:
    launcher = start_launcher(SAVES, 2, "0.3")
    wait_until_ready(launcher, 2)
    launcher.send_signal(number)
    out, err = finish(launcher)
    assert launcher.returncode == 75
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert "asked all ranks to save" in err


def test_who_has_more_to_run_learns_of_a_signal_though_the_job_ended_well() -> None:
    finished = "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT); time.sleep(0.3)"
    with pytest.raises(KeyboardInterrupt):
        run_part([RANK + finished], 1, None, program=PYTHON)
    assert run_part([RANK], 1, None, program=PYTHON) == 0


def test_a_rank_that_is_told_before_it_trains_had_nothing_to_save() -> None:
    launcher = start_launcher("import os, time; print('ready', os.getpid(), flush=True); time.sleep(60)", 2)
    wait_until_ready(launcher, 2)
    launcher.send_signal(signal.SIGINT)
    _, err = finish(launcher)
    assert launcher.returncode == 143
    assert "of 2 had not begun to train, so there was nothing to save; ending the others" in err


def test_ctrl_c_in_a_terminal_reaches_the_launcher_alone() -> None:
    """The terminal signals its whole foreground process group; the ranks are in groups of their own."""
    launcher = start_launcher(SAVES, 2, "0")
    pids = wait_until_ready(launcher, 2)
    assert all(os.getpgid(pid) != os.getpgid(launcher.pid) for pid in pids)
    launcher.send_signal(signal.SIGTERM)
    finish(launcher)


def test_a_second_ctrl_c_kills() -> None:
    launcher = start_launcher(SAVES, 2, "60")
    pids = wait_until_ready(launcher, 2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stderr is not None
    assert "Ctrl-C again" in launcher.stderr.readline()
    launcher.send_signal(signal.SIGINT)
    finish(launcher)
    assert launcher.returncode == 130
    assert wait_until_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_ranks_die_with_a_killed_launcher() -> None:
    launcher = start_launcher(SAVES, 2, "60")
    pids = wait_until_ready(launcher, 2)
    assert all(is_running(pid) for pid in pids)
    launcher.kill()
    launcher.wait(10)
    try:
        assert wait_until_gone(pids)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
        finish(launcher)


def test_a_reader_that_goes_away_does_not_stall_the_ranks() -> None:
    launcher = start_launcher("for i in range(20000): print(i, 'x' * 100)", 2)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.stdout.close()
    assert launcher.wait(20) in (0, 120)  # 120: Python could not flush its own stdout at exit.
    assert launcher.stderr is not None
    launcher.stderr.close()


THREADS = "import os; print(*[os.environ.get(n) for n in ('NPROC', 'OMP_NUM_THREADS', 'XLA_FLAGS')], sep='|')"


@pytest.mark.parametrize(
    ("devices", "flags", "expected"),
    [
        (1, "", "None|None|"),
        (10_000, "", "None|1|"),
        (10_000, "--xla_a=1", "None|1|--xla_a=1"),
    ],
)
def test_one_thread_of_blas_a_process_where_devices_outnumber_the_cores(
    devices: int, flags: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    environ = {k: v for k, v in os.environ.items() if k not in ("NPROC", "OMP_NUM_THREADS")}
    assert run_local([THREADS], 1, devices, {**environ, "XLA_FLAGS": flags}, program=PYTHON) == 0
    assert capfd.readouterr().out == f"[0] {expected}\n"


def test_a_rank_that_another_thread_is_collecting_is_no_error() -> None:
    """`poll` says None while another thread waits for the process, also when that thread has just reaped it."""
    rank = subprocess.Popen(["true"], process_group=0)
    os.waitpid(rank.pid, 0)
    with rank._waitpid_lock:  # type: ignore[attr-defined]
        assert rank.poll() is None
        local._kill([rank])
    rank.returncode = 0
