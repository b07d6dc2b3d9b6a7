"""Checkpoints under real damage: cut and flipped files, a full disk, a kill in the middle of a save."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import run_processes

from dpdist.checkpoint import Checkpoints, SaveFailedError
from dpdist.errors import InputError
from dpdist.mechanism.step import TrainState
from dpdist.saved import state_digest

META = {"config": {"learning_rate": 0.5, "name": "Alice"}, "pair": (1, 2), "nothing": float("nan")}


def state(seed: int = 0, size: int = 50) -> TrainState:
    """Containers and dtypes of all kinds, with nothing in some."""
    draw = np.random.default_rng(seed)
    weights = {"w": jnp.asarray(draw.standard_normal((size, 30)), jnp.float32), "half": jnp.ones(5, jnp.bfloat16)}
    params = {"layers": [weights, (jnp.int8(3), None)]}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return TrainState(jnp.asarray(seed, jnp.int32), params, optimizer.init(params), None)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    """Step 1 is saved."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, state(), META)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def files(checkpoints: Checkpoints, step: int = 1) -> list[Path]:
    return sorted(path for path in (checkpoints.directory / str(step)).rglob("*") if path.is_file())


def noticed(checkpoints: Checkpoints) -> bool:
    """Whether `verify` sees what was done to step 1; where it does not, what is restored must be what was saved."""
    reason = checkpoints.verify(1)
    if reason is None:
        assert_same(checkpoints.restore(1, state()), state())
        assert checkpoints.read_meta(1)["config"] == META["config"]
    else:
        assert "Alice" not in reason
    return reason is not None


def test_what_is_saved_is_restored_with_digests_of_state_and_meta(checkpoints: Checkpoints) -> None:
    assert not noticed(checkpoints)
    meta = checkpoints.read_meta(1)
    assert meta["state_sha256"] == state_digest(state())
    assert meta["pair"] == [1, 2]
    assert len(meta["meta_sha256"]) == 64


def test_the_digest_does_not_depend_on_containers_but_on_all_else() -> None:
    def digest(**changes: Any) -> str:
        return state_digest({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.int32(1), None]} | changes)

    same = TrainState(np.int32(0), {"x": np.ones(3)}, (optax.EmptyState(),), None)
    assert state_digest(same) == state_digest(dict(reversed(same._asdict().items())) | {"opt_state": [None]})
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    flipped = a.copy()
    flipped.view(np.uint8)[1, 2] ^= 1
    different = [
        digest(),
        digest(a=flipped),
        digest(a=a.reshape(3, 2)),
        digest(a=a.view(np.int32)),
        digest(b=[np.int32(1)]),
        digest(b=[None, np.int32(1)]),
        digest(c=np.int32(1)),
    ]
    assert len(set(different)) == len(different)
    with pytest.raises(ValueError, match="same path"):
        state_digest({"a": {"b": a}, "a/b": a})


def test_a_flipped_bit_in_any_file_is_noticed_or_harmless(checkpoints: Checkpoints) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"bits flipped by seed {seed}")  # shown where it fails
    draw = random.Random(seed)
    for path in files(checkpoints):
        good = path.read_bytes()
        seen = []
        for position in draw.sample(range(len(good)), min(12, len(good))):
            bad = bytearray(good)
            bad[position] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            seen.append(noticed(checkpoints))
        path.write_bytes(good)
        if path.parent.name == "meta" and path.name == "metadata":
            assert all(seen)
    assert not noticed(checkpoints)


def test_another_number_in_an_array_is_noticed(checkpoints: Checkpoints) -> None:
    """What no parser can find: a whole state, but not the one that was saved."""
    checkpoints.save(2, state(seed=2), META)
    checkpoints.wait()
    shutil.rmtree(checkpoints.directory / "1/state")
    shutil.copytree(checkpoints.directory / "2/state", checkpoints.directory / "1/state")
    assert checkpoints.verify(1) == "its arrays are not what was saved"


def test_another_setting_in_the_json_part_is_noticed(checkpoints: Checkpoints) -> None:
    path = checkpoints.directory / "1/meta/metadata"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert checkpoints.verify(1) == "its JSON part is not what was saved"
    with pytest.raises(InputError, match="not what was saved"):
        checkpoints.read_meta(1)


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99, None])
def test_a_file_that_is_cut_or_gone_is_noticed_or_harmless(checkpoints: Checkpoints, left: float | None) -> None:
    needed = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "metadata"}
    for path in files(checkpoints):
        good = path.read_bytes()
        if left is None:
            path.unlink()
        else:
            path.write_bytes(good[: int(len(good) * left)])
        seen = noticed(checkpoints)
        top = path.parent.parent == checkpoints.directory / "1" or path.parent == checkpoints.directory / "1"
        if path.name in needed and top and (left is None or path.name != "_CHECKPOINT_METADATA"):
            assert seen, path
        path.write_bytes(good)
    assert not noticed(checkpoints)


def lose_every_other_file(checkpoints: Checkpoints) -> None:
    for path in files(checkpoints)[::2]:
        path.unlink()


def cut_all_files(checkpoints: Checkpoints) -> None:
    for path in files(checkpoints):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_the_directory(checkpoints: Checkpoints) -> None:
    shutil.rmtree(checkpoints.directory / "1")
    (checkpoints.directory / "1").mkdir()


def lose_the_arrays(checkpoints: Checkpoints) -> None:
    shutil.rmtree(checkpoints.directory / "1/state")


def lose_the_json_part(checkpoints: Checkpoints) -> None:
    shutil.rmtree(checkpoints.directory / "1/meta")


@pytest.mark.parametrize(
    "harm", [lose_every_other_file, cut_all_files, empty_the_directory, lose_the_arrays, lose_the_json_part]
)
def test_great_damage_is_noticed(checkpoints: Checkpoints, harm: Callable[[Checkpoints], None]) -> None:
    harm(checkpoints)
    assert noticed(checkpoints)
    assert checkpoints.steps() == [1]  # it still has the name of a committed one


def test_only_whole_names_count_as_steps(checkpoints: Checkpoints) -> None:
    for name in ("3.orbax-checkpoint-tmp", "04", "notes", "-5"):
        (checkpoints.directory / name).mkdir()
    (checkpoints.directory / "7").write_text("a file")
    checkpoints.save(10, state(), META)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.latest()) == ([1, 10], 10)
    assert Checkpoints(checkpoints.directory.parent / "none", read_only=True).steps() == []


def test_what_is_set_aside_no_longer_counts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(2, state(2), META)
    checkpoints.wait()
    places = [checkpoints.set_aside(2, tmp_path / "damaged")]
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state(2), META)
    checkpoints.wait()
    places.append(checkpoints.set_aside(2, tmp_path / "damaged"))
    assert len(set(places)) == 2
    assert all((place / "state").is_dir() for place in places)
    checkpoints.save(3, state(3), META)  # keep=2: a damaged one that counted would cost step 1
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_the_newest_save_is_kept_even_behind_later_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    (tmp_path / "9").mkdir()
    for step in (1, 2):
        checkpoints.save(step, state(), META)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 9]
    with pytest.raises(ValueError, match="already exists"):
        checkpoints.save(2, state(), META)
    checkpoints.close()


def test_a_save_under_way_can_be_seen_without_waiting(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.busy()
    checkpoints.save(1, {"a": np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)}, {})
    assert checkpoints.busy()
    checkpoints.check()
    checkpoints.wait()
    assert not checkpoints.busy()
    checkpoints.close()


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
from dpdist.checkpoint import Checkpoints

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
from dpdist.checkpoint import Checkpoints, SaveFailedError
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
    assert second["seconds"] < 2
    assert "not done after 3 s, or it has failed on another process" in first["error"]
    assert first["seconds"] < 8
    assert (first["steps"], first["whole"]) == ([1], None)
