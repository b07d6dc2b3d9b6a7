"""A slip in the user's own code is shown to everyone with file and line; what may quote data is in the log alone."""

from __future__ import annotations

import pytest
from jobs import Jobs

SOURCE = """
from pathlib import Path

import jax.numpy as jnp
import userland

RECORD = Path(__file__).with_name("records.txt").read_text()


def data():
    return userland.arrays()


def slip():
    return usrland.arrays()


def shapes(logits, example):
    return jnp.dot(logits, jnp.ones(5))


def column(logits, example):
    return logits[example["lable"]]


def quoting(logits, example):
    raise ValueError(RECORD)


def model(**options):
    raise TypeError(RECORD)


def reading():
    raise ValueError(RECORD)
"""


@pytest.mark.parametrize(
    ("setting", "line", "words"),
    [
        ("data.source=slips:slip", "return usrland.arrays()", "NameError in slips.py, line {}: name 'usrland' is"),
        ("model.loss=slips:shapes", "return jnp.dot(logits, jnp.ones(5))", "TypeError in slips.py, line {}: dot_gen"),
        ("model.loss=slips:column", 'return logits[example["lable"]]', "KeyError in slips.py, line {}: 'lable'"),
        ("model.loss=slips:quoting", "raise ValueError(RECORD)", "ValueError in slips.py, line {} (its text may"),
        ("model.name=slips:model", "raise TypeError(RECORD)", "TypeError in slips.py, line {} (its text may"),
        ("model.name=broken:model", "1", "SyntaxError in broken.py, line 1: invalid syntax"),
        ("data.source=slips:reading", None, "failed with ValueError; what it says is in"),
    ],
)
def test_the_place_is_shown_and_the_record_is_not(jobs: Jobs, setting: str, line: str | None, words: str) -> None:
    (jobs.root / "slips.py").write_text(SOURCE)
    (jobs.root / "broken.py").write_text("def model(:\n")
    record = " ".join(map(str, [5 * 10**9 + 123, "Ali" + "ce"]))
    (jobs.root / "records.txt").write_text(record)
    run = jobs.new("slip")
    ended = jobs.train(run, setting).wait()
    assert ended.code == (1 if line is None else 2)
    number = next((n for n, text in enumerate(SOURCE.splitlines(), 1) if text.strip() == line), 0)
    assert words.format(number) in ended.err
    assert "Traceback" not in ended.err
    assert "private/logs/rank-0.log" in ended.err
    shown = ended.err + "".join(p.read_text() for p in run.root.glob("*.json*") if p.is_file())
    for piece in record.split():
        assert piece not in shown
    assert "Traceback" in run.logs
