"""What one bad record lets everyone see: that the run has ended, and nothing that the record holds, nor which it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import Ended, Jobs, Run

#: Of `userland.bad_record`.
KINDS = ("raises", "text", "column", "dtype", "shape", "ragged", "tuple", "wide", "infinite")
#: The fingerprint, before the first step, reads the first of these and not the second.
AT_THE_START, LATER = 15_872, 15_873
#: In whole words, as digits stand in hashes too. 5000 is a shape.
QUOTED = re.compile(rb"Alice|5\.?0{5,6}123|(?<![\w.])(5000|%d|%d)(?![\w.])" % (AT_THE_START, LATER))


def shown(run: Run, ended: Ended) -> dict[str, bytes]:
    """What others can read: both streams, which SLURM collects, and the run directory but for `private/`."""
    found = {"stdout": ended.out.encode(), "stderr": ended.err.encode()}
    for path in run.root.rglob("*"):
        if path.is_file() and "private" not in path.relative_to(run.root).parts:
            found[path.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module", params=[AT_THE_START, LATER], ids=["at the start", "later"])
def ended(request: pytest.FixtureRequest, jobs: Jobs) -> dict[str, tuple[int, Run, Ended]]:
    """A run of each kind, all at the same time."""
    given = ("sampling.expected_batch_size=10000", "training.physical_batch_size=512", "privacy.delta=1e-5")
    started = {}
    for kind in KINDS:
        run = jobs.new(f"bad-{kind}")
        source = ("data.source=userland:bad_record", f"data.options.kind={kind}")
        started[kind] = run, jobs.train(run, *source, *given, BAD_RECORD=str(request.param))
    return {kind: (request.param, run, running.wait()) for kind, (run, running) in started.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_record_is_quoted_in_private_alone(ended: dict[str, tuple[int, Run, Ended]], kind: str) -> None:
    index, run, end = ended[kind]
    # The words of an own source may quote, and those of the last two name a column.
    unsaid = ("raises",) if index == AT_THE_START else ("raises", "wide", "infinite")
    assert end.code == (1 if kind in unsaid else 2), end.err
    for name, content in shown(run, end).items():
        assert not QUOTED.search(content), (name, content[-2000:])
    assert "private/logs/rank-0.log" in end.err
    assert re.search(rf"(record|example) {index}\b", run.logs)  # its owner is told which one it is
    if index == LATER:
        assert run.summary["status"] == "failed"


def test_a_label_out_of_range_is_quoted_in_private_alone(jobs: Jobs) -> None:
    run = jobs.new("label")
    end = jobs.train(run, "data.source=userland:bad_label", "privacy.delta=1e-5", BAD_RECORD=str(LATER)).wait()
    assert end.code == 2
    assert "some values of 'label' lie outside 0 to 3" in end.err
    for name, content in shown(run, end).items():
        assert not QUOTED.search(content), (name, content[-2000:])
    assert f"500000123, of example {LATER}" in run.logs


def test_the_search_sees_what_it_looks_for(jobs: Jobs, tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "summary.json").write_text('{"error": "record 15873"}')
    found = shown(run, Ended(1, "Alice", "example 15872 has 5000000123"))
    assert {name for name, content in found.items() if QUOTED.search(content)} == {"stdout", "stderr", "summary.json"}
