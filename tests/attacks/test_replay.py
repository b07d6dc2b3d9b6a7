"""The erased record: a step that was released is taken again over other data, or by other means, with the same noise.

The attacker holds two exports of one run. Where both come from one draw, their difference shows what has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import erasable
import numpy as np
import pytest
from jobs import Jobs, Run
from safetensors.numpy import load_file

#: The run goes back to the first of these steps, after it was shown at the second.
FORK, END = 10, 20
OWN_SECRET = "privacy.insecure_seed=null"


@pytest.fixture(scope="module")
def attacked(jobs: Jobs) -> Jobs:
    shutil.copy(erasable.__file__, jobs.root)
    return jobs


def settings(erased: Path) -> list[str]:
    return [
        "data.source=erasable:records",
        f"data.options={{erased: {erased}}}",
        "model.name=erasable:linear",
        "optimizer.momentum=0",
        "optimizer.average_decay=0",
        "sampling.expected_batch_size=500",
        f"training.steps={END}",
        f"checkpoint.every_steps={FORK}",
        OWN_SECRET,
    ]


def delete(run: Run) -> None:
    shutil.rmtree(run.root / "checkpoints" / str(END))


def flip_a_bit(run: Run) -> None:
    files = [path for path in (run.root / "checkpoints" / str(END) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def export(jobs: Jobs, run: Run, name: str) -> dict[str, np.ndarray]:
    to = run.root.with_name(f"{run.root.name}-{name}")
    ended = jobs.command("export", str(run.root), "--to", str(to)).wait()
    assert ended.code == 0, ended.err
    assert '"guarantee": "holds"' in (to / "privacy.json").read_text()
    return load_file(to / "params.safetensors")


def resemblance(first: dict[str, np.ndarray], second: dict[str, np.ndarray], image: np.ndarray) -> float:
    """The largest correlation of an image with what the two exports differ in, over the classes."""
    difference = first["w"].astype(float) - second["w"]
    return max(abs(float(np.corrcoef(column, image)[0, 1])) for column in difference.T if column.any())


@pytest.mark.parametrize("harm", [delete, flip_a_bit])
def test_an_erased_record_does_not_show_in_the_difference_of_two_exports(
    attacked: Jobs, tmp_path: Path, harm: Callable[[Run], None]
) -> None:
    """The fingerprint of such a source reads 64 records, and the victim is none of them."""
    erased, run = tmp_path / "erased", attacked.new("erased")
    assert attacked.train(run, *settings(erased)).wait().code == 0
    before = export(attacked, run, "before")
    harm(run)
    (run.root / "summary.json").unlink()
    erased.touch()
    ended = attacked.train(run, *settings(erased)).wait()
    assert ended.code == 0, ended.err
    after = export(attacked, run, "after")
    assert resemblance(before, after, erasable.columns()[0][erasable.VICTIM]) < 0.5
    assert f"incarnation 1 begins at step {FORK}" in ended.err
    assert run.summary["charged_steps"] == END + (END - FORK)
