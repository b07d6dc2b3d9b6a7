"""Runs that several tests look at, each made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs import Jobs, Run, wait_all


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
