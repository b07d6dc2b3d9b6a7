"""The lease on a run directory, with real processes that are killed, stopped and continued."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from owners import TIMEOUT, Owners

from dpdist.cluster import holder
from dpdist.cluster.holder import Holder
from dpdist.cluster.lease import Lease, LeaseLostError
from dpdist.errors import InputError


def refusal(directory: Path, timeout: float = TIMEOUT) -> tuple[str, float]:
    """Return why this process cannot lease `directory`, and the seconds it took to find out."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        Lease.acquire(directory, timeout)
    assert caught.value.field == "run.dir"
    return str(caught.value), time.monotonic() - began


def taken(directory: Path, timeout: float = TIMEOUT) -> tuple[str | None, float]:
    """Take the lease; return the holder it was taken from and the seconds it took."""
    began = time.monotonic()
    with Lease.acquire(directory, timeout) as lease:
        lease.check()
        return lease.taken_from, time.monotonic() - began


def pretend(directory: Path, generation: int = 1, /, **changes: Any) -> Path:
    """Return the content of a lease file of this process, with `changes`."""
    fields = json.loads(Holder.of_this_process(directory, TIMEOUT).encode()) | changes
    path = directory / f"lease.{generation}"
    path.write_text(json.dumps(fields) + "\n")
    return path


def test_a_live_owner_is_named_and_refused_at_once(owners: Owners) -> None:
    owner = owners.holding(timeout=30, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="2")
    message, seconds = refusal(owners.directory, timeout=30)
    assert seconds < 1
    assert str(owners.directory) in message
    assert f"process {owner.pid} on {os.uname().nodename} (SLURM job 77 restart 2, began 0:00:0" in message
    assert "wait for it to end, cancel it, or name another run.dir" in message
    assert owner.do("check") == {"done": None}


@pytest.mark.parametrize("where", ["here", "remote"])
def test_a_former_start_of_the_same_slurm_job_is_waited_for(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It may still be dying, also on a node that SLURM has given up; but the wait has a bound."""
    owner = owners.holding(where, SLURM_JOB_ID="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("dpdist.cluster.lease._LEAVING", 1.0)
    message, seconds = refusal(owners.directory)
    assert "is in use by" in message
    assert 1 <= seconds < 3
    monkeypatch.setattr("dpdist.cluster.lease._LEAVING", 30.0)
    killing = threading.Timer(1.0, owner.signal, [signal.SIGKILL])
    killing.start()
    who, seconds = taken(owners.directory)
    killing.join()
    assert who is not None
    assert 1 <= seconds < 10


def test_a_lease_of_this_very_process_is_refused_too(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, TIMEOUT):
        assert f"process {os.getpid()}" in refusal(tmp_path)[0]


def test_its_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, TIMEOUT):
        assert [path.name for path in tmp_path.iterdir()] == ["lease.1"]
        assert stat.S_IMODE((tmp_path / "lease.1").stat().st_mode) == 0o600


def test_a_released_lease_is_free_at_once(owners: Owners) -> None:
    for where in ("here", "remote"):
        owner = owners.holding(where, timeout=30)
        assert owner.do("release") == owner.do("release") == {"done": None}
        who, seconds = taken(owners.directory, timeout=30)
        assert who is None
        assert seconds < 1
        assert owner.do("check")["error"].startswith("LeaseLostError")


def test_releasing_survives_an_exception_and_ends_the_thread(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Lease.acquire(tmp_path, 30) as lease:
        _ = 1 / 0
    assert not lease._thread.is_alive()
    with pytest.raises(LeaseLostError, match="released"):
        lease.check()
    assert taken(tmp_path, 30)[1] < 1


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_of_this_host_is_replaced_at_once(owners: Owners, reaped: bool) -> None:
    owner = owners.holding(timeout=30)
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))  # WNOWAIT leaves a zombie
    who, seconds = taken(owners.directory, timeout=30)
    assert who is not None
    assert f"process {owner.pid} on" in who
    assert "no longer runs" in who
    assert seconds < 2


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    pretend(tmp_path, started=1)
    who, seconds = taken(tmp_path, 30)
    assert who is not None
    assert seconds < 1


def test_a_dying_owner_is_not_dead_as_long_as_one_of_its_threads_may_still_write(tmp_path: Path) -> None:
    program = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        here = Holder.of_this_process(tmp_path, TIMEOUT)
        while (found := holder._process(process.pid)) and found[0] != "Z":
            time.sleep(0.01)
        assert found is not None
        dying = dataclasses.replace(here, pid=process.pid, started=found[1])
        assert dying.is_alive(here) is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert dying.is_alive(here) is False


def test_a_stopped_owner_of_this_host_is_alive(owners: Owners) -> None:
    owner = owners.holding(timeout=0.3)
    owner.signal(signal.SIGSTOP)
    time.sleep(0.6)
    assert f"process {owner.pid}" in refusal(owners.directory, timeout=0.3)[0]
    owner.signal(signal.SIGCONT)
    assert owner.do("check") == {"done": None}


def test_a_live_owner_elsewhere_is_refused_by_its_heartbeat(owners: Owners) -> None:
    owner = owners.holding("remote")
    message, seconds = refusal(owners.directory)
    assert f"process {owner.pid}" in message
    assert seconds < TIMEOUT
    assert owner.do("check") == {"done": None}


def test_a_silent_owner_elsewhere_is_replaced_after_the_timeout_and_not_before(owners: Owners) -> None:
    owners.holding("remote").signal(signal.SIGKILL)
    who, seconds = taken(owners.directory)
    assert who is not None
    assert f"gave no sign for {TIMEOUT:g} s" in who
    assert TIMEOUT <= seconds < TIMEOUT + 1


def test_the_owners_own_longer_timeout_counts(owners: Owners) -> None:
    owners.holding("remote", timeout=TIMEOUT)  # beats every 0.2 s
    assert "is in use" in refusal(owners.directory, timeout=0.05)[0]


def test_an_owner_elsewhere_that_resumes_finds_that_it_lost(owners: Owners) -> None:
    owner = owners.holding("remote")
    owner.signal(signal.SIGSTOP)
    with Lease.acquire(owners.directory, TIMEOUT) as thief:
        owner.signal(signal.SIGCONT)
        assert "another job has taken" in owner.do("check")["error"]
        time.sleep(TIMEOUT / 2)  # its heartbeats, if any, must not disturb ours
        assert owner.do("release") == {"done": None}
        thief.check()
        message = refusal(owners.directory)[0]
        assert f"process {os.getpid()}" in message


def test_the_heartbeat_notices_a_loss_by_itself(owners: Owners) -> None:
    with Lease.acquire(owners.directory, TIMEOUT) as lease:
        pretend(owners.directory, 2)
        time.sleep(TIMEOUT / 2)
        (owners.directory / "lease.2").unlink()  # too late
        with pytest.raises(LeaseLostError, match="has taken"):
            lease.check()


@pytest.mark.parametrize("remove", [lambda path: path.unlink(), lambda path: shutil.rmtree(path.parent)])
def test_a_lease_that_was_removed_by_hand_is_lost(tmp_path: Path, remove: Callable[[Path], None]) -> None:
    with Lease.acquire(tmp_path, TIMEOUT) as lease:
        remove(tmp_path / "lease.1")
        with pytest.raises(LeaseLostError):
            lease.check()


def test_a_lease_that_was_replaced_by_hand_is_lost_and_left_alone(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, TIMEOUT) as lease:
        replaced = pretend(tmp_path).read_bytes()
        with pytest.raises(LeaseLostError, match="removed or replaced"):
            lease.check()
        time.sleep(TIMEOUT / 2)
    assert (tmp_path / "lease.1").read_bytes() == replaced


WHOLE = json.dumps({"owner": "x", "host": "n01", "pid": 3})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]", b"null", WHOLE.encode(), WHOLE[:20].encode()])
def test_a_damaged_lease_is_watched_and_then_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease.4").write_bytes(content)
    who, seconds = taken(tmp_path, 0.3)
    assert who is not None
    assert "unknown owner (lease.4 is damaged)" in who
    assert 0.3 <= seconds < 1.3
    assert (tmp_path / "lease.5").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("pid", "x"), ("pid", -1), ("pid", None), ("directory", 5), ("state", "?"), ("age", "9" * 30)]
)
def test_a_field_that_makes_no_sense_is_damage(tmp_path: Path, field: str, value: object) -> None:
    assert Holder.decode(pretend(tmp_path).read_bytes()) is not None
    assert Holder.decode(pretend(tmp_path, **{field: value}).read_bytes()) is None


def test_a_damaged_lease_that_changes_belongs_to_someone_alive(owners: Owners) -> None:
    path = owners.directory / "lease.1"
    path.touch()
    contender = owners.start(timeout=30)
    contender.say("acquire")
    time.sleep(0.5)
    path.write_text("{")
    assert "unknown owner" in contender.answer()["error"]


def test_a_copy_of_a_live_run_is_free_after_the_timeout(
    owners: Owners, tmp_path_factory: pytest.TempPathFactory
) -> None:
    owners.holding(timeout=0.3)
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(owners.directory / "lease.1", copy)
    assert taken(copy, 0.3)[1] >= 0.3


def test_old_generations_go_but_for_the_one_before(tmp_path: Path) -> None:
    (tmp_path / ".lease.of-a-contender-that-died").touch()
    (tmp_path / "secret.key").touch()
    for _ in range(5):
        taken(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.4", "lease.5", "secret.key"]


def test_a_contender_that_slept_through_takeovers_withdraws(tmp_path: Path) -> None:
    slept = Lease(tmp_path, 2, Holder.of_this_process(tmp_path, TIMEOUT))  # it saw lease.1 released, then slept
    for _ in range(5):
        taken(tmp_path)
    assert not slept._create()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.4", "lease.5"]


def test_without_hard_links_creation_is_still_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, second = (Lease(tmp_path, 1, Holder.of_this_process(tmp_path, TIMEOUT)) for _ in range(2))
    assert first._create()
    assert not second._create()
    first.check()
    assert [path.name for path in tmp_path.iterdir()] == ["lease.1"]


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr(os, "link", link_twice)
    assert Lease(tmp_path, 1, Holder.of_this_process(tmp_path, TIMEOUT))._create()


def test_a_directory_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "gone")[0]
