"""Process 0's writer and the null object of the other processes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from private_runs import private_run
from worlds import alone

import dpdist
from dpdist.cluster.lease import Lease
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger
from dpdist.run import events
from dpdist.run.directory import RunDirectory
from dpdist.run.opening import open_writer
from dpdist.run.writer import RunWriter, SilentWriter


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return dpdist.from_dict(
        {
            "model": {"name": "mlp"},
            "privacy": {"enabled": False},
            "training": {"steps": 1},
            "run": {"dir": str(tmp_path / "run")},
        }
    )


@pytest.fixture
def run(config: Config) -> RunDirectory:
    directory = RunDirectory(Path(config.run.dir))
    directory.prepare()
    return directory


def methods(kind: type) -> dict[str, Any]:
    public = {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}
    return {name: inspect.signature(value) for name, value in public.items()}


def test_the_null_object_has_every_method_of_the_writer() -> None:
    assert methods(SilentWriter) == methods(RunWriter)


def test_no_other_process_answers_for_process_0() -> None:
    silent: Any = SilentWriter()
    for ask in (
        lambda: silent.ledger,
        lambda: silent.begin(None, None),
        lambda: silent.has_evaluation(1),
        lambda: silent.summary(step=1, ended=True, params_sha256=None, finite=True),
    ):
        with pytest.raises(RuntimeError, match="only process 0"):
            ask()


def test_a_writer_holds_the_lease_until_it_is_released(config: Config, run: RunDirectory) -> None:
    writer = open_writer(config, run, alone())
    with pytest.raises(InputError, match="is in use by"):
        open_writer(config, run, alone())
    writer.release()
    open_writer(config, run, alone()).release()


def test_a_writer_that_cannot_read_the_ledger_gives_the_lease_back(config: Config, run: RunDirectory) -> None:
    run.ledger.write_text("{}\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        open_writer(config, run, alone())
    lease = Lease.acquire(run.private, 5)
    assert lease.taken_from is None
    lease.release()


@pytest.mark.parametrize("status", ["finished", "preempted"])
def test_a_refused_start_leaves_a_run_that_had_begun_as_it_was(tmp_path: Path, config: Config, status: str) -> None:
    root = private_run(tmp_path / "run")
    run, ledger = RunDirectory(root), Ledger(root / "ledger.jsonl")
    run.prepare()
    ledger.record_saved(40)
    run.ranks.write_text(json.dumps({"slurm_job": "17"}))
    run.summary.write_text(json.dumps({"status": status}))
    run.secret.unlink()

    def content() -> dict[str, bytes]:
        files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("lease.")]
        return {path.name: path.read_bytes() for path in files}

    before = content()
    writer = open_writer(config, run, alone())
    run.create_secret()
    assert "goodput.json" in content()
    writer.failed(InputError("training.steps", 9, "cannot be."))
    writer.release()
    after = content()
    told = [json.loads(line) for line in after.pop("events.jsonl", b"").splitlines()]
    assert after == before
    # Somebody may be waiting for a run that has not ended: they are told, and of the step that it has come to.
    assert [(event["event"], event["step"]) for event in told] == ([] if status == "finished" else [("failed", 40)])


def test_a_start_that_fails_without_being_refused_is_a_part_of_the_run(tmp_path: Path, config: Config) -> None:
    run = RunDirectory(private_run(tmp_path / "run"))
    run.prepare()
    writer = open_writer(config, run, alone())
    writer.failed(MemoryError())
    writer.release()
    assert json.loads(run.goodput.read_text())["closed"]
    assert run.ranks.exists()
    assert [event["event"] for event in events.read(run.events)] == ["failed"]
