"""No two processes own a run directory at once, however contenders race, die, freeze and resume."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from owners import Owner, Owners

RACE = """
import os, sys, time
from dpdist.cluster.lease import Lease
from dpdist.errors import InputError

contenders, rounds, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for number in range(rounds):
    where = f"{directory}/{number}"
    os.mkdir(where)
    (go, start), (judged, wait) = os.pipe(), os.pipe()
    for _ in range(contenders):
        if os.fork():
            continue
        os.close(start), os.close(wait)
        os.read(go, 1)  # returns when the parent closes its end: for all contenders at once
        try:
            lease = Lease.acquire(where, 30.0)
        except InputError:
            os._exit(0)
        try:
            time.sleep(0.02)
            lease.check()
        except Exception:
            os._exit(2)
        os.write(os.open(f"{where}/owners", os.O_WRONLY | os.O_CREAT | os.O_APPEND), b"x")
        os.read(judged, 1)  # stay alive: another contender could rightly replace a dead owner
        os._exit(0)
    os.close(go), os.close(judged), os.close(start)
    codes, deadline = [], time.monotonic() + 60
    while len(codes) < contenders - 1 and time.monotonic() < deadline:
        ended, status = os.waitpid(-1, os.WNOHANG)  # the losers; the owner waits
        codes += [os.waitstatus_to_exitcode(status)] if ended else []
        time.sleep(0.005)
    os.close(wait)
    while len(codes) < contenders:
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    assert not any(codes), (number, codes)
    owners = os.path.getsize(f"{where}/owners")
    assert owners == 1, (number, owners)
"""


@pytest.mark.parametrize(("contenders", "rounds"), [(2, 6), (8, 6)])
def test_one_of_several_at_once_wins(tmp_path: Path, contenders: int, rounds: int) -> None:
    run_script(RACE, contenders, rounds, tmp_path)


KILLINGS = """
import fcntl, os, random, signal, sys, time
from dpdist.cluster.lease import Lease
from dpdist.errors import InputError

directory, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

def contend(seed):
    \"\"\"Own the run once; a lock, which the kernel drops when its holder dies, shows that no one else does.\"\"\"
    chance = random.Random(seed)
    witness = os.open(f"{directory}/witness", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    while True:
        try:
            lease = Lease.acquire(directory, 30.0)
            break
        except InputError:
            time.sleep(chance.uniform(0.0, 0.004))
    fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for _ in range(chance.randrange(4)):
        lease.check()
        time.sleep(chance.uniform(0.0, 0.004))
    lease.check()
    os.write(witness, b"o")
    fcntl.flock(witness, fcntl.LOCK_UN)
    lease.release()

killed = 0
for number in range(rounds):
    children = []
    for _ in range(3):
        seed = chance.random()
        child = os.fork()
        if not child:
            code = 1
            try:
                contend(seed)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    time.sleep(chance.uniform(0.0, 0.03))
    victim = chance.choice(children)
    os.kill(victim, signal.SIGKILL)
    for child in children:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += code == -signal.SIGKILL
        assert code == 0 or (child == victim and code == -signal.SIGKILL), (number, code)
print(killed, os.path.getsize(f"{directory}/witness"))
"""


def test_no_two_own_at_once_while_contenders_are_killed(tmp_path: Path) -> None:
    rounds = 100
    killed, owned = map(int, run_script(KILLINGS, tmp_path, rounds, 7).split())
    assert killed > rounds / 4  # otherwise the test shows little
    assert owned >= 2 * rounds  # all survivors became owner


def test_no_two_own_at_once_while_owners_elsewhere_freeze_and_resume(owners: Owners) -> None:
    """Each contender takes over from a frozen owner; every owner that resumes notices, in any order."""
    frozen: list[Owner] = []
    for generation in range(1, 5):
        owner = owners.start("remote", timeout=0.6)
        answer = owner.do("acquire")
        assert answer["generation"] == generation
        assert (answer["taken_from"] is None) == (generation == 1)
        if frozen and generation % 2:
            frozen[-1].signal(signal.SIGCONT)
            assert "lost" in frozen[-1].do("check")["error"].lower()
        owner.signal(signal.SIGSTOP)
        frozen.append(owner)
    for owner in frozen:
        owner.signal(signal.SIGCONT)
    answers = [owner.do("check") for owner in frozen]
    assert ["error" in answer for answer in answers] == [True, True, True, False]


def run_script(script: str, *arguments: object) -> str:
    """Run `script` in its own process group and return what it prints; the group is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return out
