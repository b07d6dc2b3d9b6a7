"""Process 0's writer and the null object of the other processes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from worlds import alone

import dpdist
from dpdist.cluster.lease import Lease
from dpdist.config import Config
from dpdist.errors import InputError
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
