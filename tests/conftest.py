"""Runs that several tests look at, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jobs import Jobs, Run, wait_all

if TYPE_CHECKING:
    from dpdist.run.checkpoint import Checkpoints


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.close()


@pytest.fixture(scope="session")
def uninterrupted(jobs: Jobs) -> Run:
    """The reference: 2 processes with 2 devices each, left alone to the end."""
    run = jobs.new("2x2")
    wait_all([jobs.launch(run, 2, 2)])
    return run


@pytest.fixture(scope="session")
def single(jobs: Jobs) -> Run:
    """One process with one device."""
    run = jobs.new("1x1")
    wait_all([jobs.train(run)])
    return run


@pytest.fixture(scope="session")
def four_processes(jobs: Jobs) -> Run:
    """Four processes with one device each."""
    run = jobs.new("4x1")
    wait_all(jobs.ranks(run, 4, 1))
    return run


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    """Step 1 is saved."""
    from saves import META, state  # Orbax takes seconds to import, and few tests need it

    from dpdist.run.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, state(), META)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()
