"""Damage of every kind is noticed before anything is restored, or changes nothing of what is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from saves import META, noticed, state

from dpdist.errors import InputError
from dpdist.run.checkpoint import Checkpoints


def files(checkpoints: Checkpoints, step: int = 1) -> list[Path]:
    return sorted(path for path in (checkpoints.directory / str(step)).rglob("*") if path.is_file())


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
