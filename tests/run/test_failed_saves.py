"""Saves that run out of space, are cut short or fail on one process: what was whole stays whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import run_processes
from saves import META, assert_same, state

from dpdist.run.checkpoint import Checkpoints, SaveFailedError


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own, such as `size=300k`, until the end of the test."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)], capture_output=True, text=True)
    if mounted.returncode != 0:
        if os.environ.get("DPDIST_REQUIRE_SLURM") == "1":
            pytest.fail(f"no file system can be mounted here: {mounted.stderr}")
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("resource_", ["size={}k", "size=8m,nr_inodes={}"])
def test_a_disk_that_fills_at_any_moment_costs_no_checkpoint(tmp_path: Path, resource_: str) -> None:
    """The sizes reach from room for one checkpoint to room for two."""
    ended = []
    sizes = range(80, 230, 10) if "size={}k" in resource_ else range(26, 66, 3)
    for size in sizes:
        with small_disk(tmp_path / str(size), resource_.format(size)) as disk:
            checkpoints = Checkpoints(disk / "checkpoints", keep=1)
            try:
                checkpoints.save(1, state(1), META)
                checkpoints.wait()
            except SaveFailedError:
                ended.append("no room")
                continue
            try:
                checkpoints.save(2, state(2), META)
                checkpoints.wait()
                step = 2
            except SaveFailedError as error:
                step = 1
                message = str(error)
                assert str(disk / "checkpoints/2") in message
                assert "No space left on device; free space and run the same command again" in message
                assert "the newest whole checkpoint is step 1" in message
                for again in (checkpoints.check, checkpoints.wait, checkpoints.close):
                    with pytest.raises(SaveFailedError):
                        again()
                assert not checkpoints.busy()
            assert checkpoints.steps() == [step]
            assert checkpoints.verify(step) is None
            subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=1000", str(disk)], check=True)
            checkpoints = Checkpoints(disk / "checkpoints", keep=1)
            assert [path.name for path in checkpoints.directory.iterdir()] == [str(step)]
            assert_same(checkpoints.restore(step, state()), state(step))
            checkpoints.save(3, state(3), META)
            checkpoints.close()
            assert [path.name for path in checkpoints.directory.iterdir()] == ["3"]
            ended.append(f"step {step}")
    assert {"step 1", "step 2"} <= set(ended), ended
    print(ended)


def test_a_checkpoint_that_has_its_name_and_is_not_on_the_disk_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on it must not be shown, however soon somebody asks after the failure."""

    def fails(self: Checkpoints, step: int) -> None:
        if step == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Checkpoints, "synchronise", fails)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step), META)
        assert not checkpoints.busy(60)
    assert checkpoints.steps() == [1, 2]
    assert [checkpoints.committed(step) for step in (1, 2)] == [True, False]
    with pytest.raises(SaveFailedError):
        checkpoints.close()


def test_another_reason_than_space_is_named_with_another_remedy(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        checkpoints.save(1, state(), META)
        with pytest.raises(SaveFailedError, match=r"File too large; mend that .* there is no whole checkpoint"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoints.steps() == []


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import jax.numpy as jnp, numpy as np
from dpdist.run.checkpoint import Checkpoints

def state(step):
    return {"step": np.asarray(step), "w": np.random.default_rng(step).standard_normal((400, 300))}

def child():
    checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
    steps = checkpoints.steps()
    found = {str(step): checkpoints.verify(step) for step in steps}
    newest = checkpoints.latest() or 0
    if steps:
        restored = checkpoints.restore(newest, state(newest))
        assert (restored["w"] == state(newest)["w"]).all() and restored["step"] == newest
    print(json.dumps(found), flush=True)
    for step in range(newest + 1, newest + 10000):
        checkpoints.save(step, state(step), {"step": step})

draw = random.Random(int(sys.argv[2]))
for round in range(int(sys.argv[3])):
    pid = os.fork()  # no JAX backend has been started yet
    if pid == 0:
        child()
    time.sleep(draw.uniform(0.4, 1.0))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_a_kill_in_the_middle_of_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """With `keep=1`: the old one may go only when the new one is there."""
    seed, rounds = random.SystemRandom().randrange(2**32), 15
    print(f"killed at the random times of seed {seed}")
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), str(seed), str(rounds)]
    ended = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(told) > rounds / 2, ended.stderr
    begun = [found for found in told if found]
    assert told[told.index(begun[0]) :] == begun  # once there is one, there always is one
    assert all(reason is None for found in begun for reason in found.values())
    newest = [max(map(int, found)) for found in begun]
    assert newest == sorted(newest)
    assert newest[-1] > newest[0]


TOGETHER = """
import resource
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpdist.run.checkpoint import Checkpoints, SaveFailedError
job = join(cluster())
checkpoints = Checkpoints(Path(sys.argv[1]), keep=5, timeout=3)
everywhere = NamedSharding(job.mesh, PartitionSpec())
def state(step):
    values = {"w": np.random.default_rng(step).standard_normal((400, 300)).astype(np.float32), "step": np.int32(step)}
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index]), values)
"""


def test_process_0_verifies_alone_while_the_other_waits_and_then_both_restore(tmp_path: Path) -> None:
    reports = run_processes(
        TOGETHER
        + """
for step in (1, 2):
    checkpoints.save(step, state(step), {"step": step})
checkpoints.wait()

def decision():
    found = [path for path in (Path(sys.argv[1]) / "2/state").rglob("*") if path.is_file()]
    largest = max(found, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    reasons = [checkpoints.verify(step) for step in (2, 1)]
    checkpoints.set_aside(2, Path(sys.argv[1]).parent / "damaged")
    return {"reasons": reasons, "steps": checkpoints.steps()}

decided = agreement.decide(job, decision)
restored = checkpoints.restore(1, state(0))
report(decided=decided, meta=checkpoints.read_meta(1)["step"], steps=checkpoints.steps(),
       sum=float(np.asarray(restored["w"], np.float64).sum()), step=int(restored["step"]))
checkpoints.save(2, state(2), {"step": 2})
checkpoints.close()
report(again=agreement.decide(job, lambda: checkpoints.verify(2)))
leave()
""",
        2,
        str(tmp_path / "checkpoints"),
    )
    total = np.random.default_rng(1).standard_normal((400, 300)).astype(np.float32).astype(np.float64).sum()
    for facts in reports:
        broken, whole = facts["decided"]["reasons"]
        assert broken is not None
        assert whole is None
        assert facts["decided"]["steps"] == facts["steps"] == [1]
        assert (facts["meta"], facts["step"], facts["again"]) == (1, 1, None)
        assert facts["sum"] == pytest.approx(total, abs=1e-6)


def test_a_save_that_fails_on_one_process_is_told_there_at_once_and_to_the_other_in_time(tmp_path: Path) -> None:
    first, second = run_processes(
        TOGETHER
        + """
checkpoints.save(1, state(1), {})
checkpoints.wait()
if not job.is_main:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
began = time.monotonic()
checkpoints.save(2, state(2), {})
while checkpoints.busy():
    time.sleep(0.01)
try:
    checkpoints.check()
    report(error=None)
except SaveFailedError as error:
    report(error=str(error), seconds=time.monotonic() - began)
agreement.barrier("end", job)
report(steps=checkpoints.steps(), whole=checkpoints.verify(1) if job.is_main else None)
os._exit(0)
""",
        2,
        str(tmp_path / "checkpoints"),
    )
    assert "File too large" in second["error"]
    assert "not done after 3 s, or it has failed on another process" in first["error"]
    assert max(first["seconds"], second["seconds"]) < 30
    assert (first["steps"], first["whole"]) == ([1], None)
