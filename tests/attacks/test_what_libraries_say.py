"""What a library says while it reads a record may be about that record, and then tells that it was sampled."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import Ended, Jobs, Run
from PIL import Image

#: A data library that says something of every record, in each way that Python has.
SOURCE = """
import logging, sys, threading, warnings

import userland


def handler_of(name):
    logger = logging.getLogger(name)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    return logger


EARLY = handler_of("early.library")  # before a run is opened
UNHEARD = logging.getLogger("unheard.library")  # without a handler: `logging.lastResort` writes to stderr
UNHEARD.propagate = False


class Falling:
    def __del__(self):
        raise ValueError("Alice deleted")


def quote():
    raise ValueError("Alice in a thread")


def say():
    logging.getLogger("a.library").warning("Alice logged")
    logging.getLogger("a.library").warning("%d is no number", "Alice misfit")
    logging.getLogger("dpdistant").error("Alice alike")
    logging.error("Alice at the root")
    try:
        raise ValueError("Alice raised")
    except ValueError:
        logging.getLogger("a.library").exception("failed")
        EARLY.exception("failed")
    EARLY.warning("Alice early")
    handler_of("late.library").warning("Alice late")
    UNHEARD.warning("Alice unheard")
    warnings.warn("Alice warned", stacklevel=1)
    warnings.showwarning("Alice shown", UserWarning, "a.py", 1)
    warnings.showwarning("Alice filed", UserWarning, "a.py", 1, sys.stderr)
    print("Alice printed", file=sys.stderr)
    thread = threading.Thread(target=quote)
    thread.start()
    thread.join()
    Falling()


class Loud(userland.Items):
    def __getitem__(self, index):
        if index % 50 == 7:
            say()
        return super().__getitem__(index)


def data():
    return Loud(userland.train_columns()), Loud(userland.test_columns())


def test_data():
    return userland.Items(userland.train_columns()), Loud(userland.test_columns())
"""
WAYS = (
    *("logged", "misfit", "alike", "at the root", "raised", "shown", "filed", "printed", "warned"),
    *("in a thread", "deleted", "late", "unheard"),
)


def public(run: Run, ended: Ended) -> str:
    """Both streams, which SLURM collects, and the files of the run outside `private/`."""
    files = [path for path in run.root.glob("*.json*") if path.is_file()]
    return ended.out + ended.err + "".join(path.read_text() for path in files)


@pytest.mark.parametrize("source", ["data", "test_data"])
def test_what_a_library_says_of_a_record_is_in_private_alone(jobs: Jobs, source: str) -> None:
    (jobs.root / "loud.py").write_text(SOURCE)
    run = jobs.new("loud")
    ended = jobs.train(run, f"data.source=loud:{source}").wait()
    assert ended.code == 0, ended.err
    assert "Alice" not in public(run, ended)
    missing = [way for way in WAYS if f"Alice {way}" not in run.logs]
    assert not missing
    assert "finished" in ended.err  # our own lines are shown


def palette(path: Path) -> None:
    """Of this image, Pillow warns."""
    image = Image.fromarray(np.zeros((8, 8), np.uint8), "L").convert("P")
    image.save(path, transparency=bytes(range(200)))


def damaged(path: Path) -> None:
    """Of this image, libtiff complains by itself, on descriptor 2, and decodes it all the same."""
    pixels = np.random.default_rng(0).integers(0, 2, (40, 40)).astype(np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "TIFF", compression="group4")
    content = bytearray(file.getvalue())
    content[20:24] = b"\xff" * 4
    path.write_bytes(content)


def test_what_is_said_of_an_image_is_not_shown(jobs: Jobs, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for number in range(30):
                pixels = np.full((8, 8), number + 100 * (part == "test"), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            palette(folder / "palette.png")
            damaged(folder / "damaged.tif")
    run = jobs.new("images")
    model = ("model.name=mlp", "model.options.hidden=[4]", "sampling.expected_batch_size=32", "training.steps=4")
    data = ("data.source=image_folder", f"data.path={tmp_path}", "data.options.size=8", "privacy.delta=1e-3")
    command = ["train", str(jobs.config), f"--run-dir={run.root}", *data, *model]
    ended = jobs.program([sys.executable, "-m", "launch", *command]).wait()
    assert ended.code == 0, ended.err
    shown = public(run, ended)
    assert "alette" not in shown
    assert "Fax4Decode" not in shown
    assert "Palette images with Transparency" in run.logs


def test_libtiff_complains_by_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Or the test above would not see a thing."""
    damaged(tmp_path / "damaged.tif")
    with Image.open(tmp_path / "damaged.tif") as image:
        image.load()
    assert "Fax4Decode" in capfd.readouterr().err
