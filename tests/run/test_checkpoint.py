"""Checkpoints that keep what they were given, and say what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from saves import META, noticed, state

from dpdist.mechanism.step import TrainState
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.integrity import state_digest


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
