"""The lane of every test, its compilation cache, and runs that several tests look at, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import compiled
import jax
import lanes
import progress
import pytest
from jobs import COMPILED_ANEW, Jobs, Run, wait_all
from pages import Given, everything
from ways import way

if TYPE_CHECKING:
    from dpdist.run.checkpoint import Checkpoints

compiled.keep_between_runs()


@pytest.hookimpl(tryfirst=True)  # before the expression of `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lanes.mark(items)
    try:
        jax.config.update("jax_num_cpu_devices", 8)
    except RuntimeError as error:
        # Some tests fork this process, and JAX's threads do not survive that: it must start in the tests that use it.
        raise pytest.UsageError(f"a module uses JAX while it is imported; do it in a fixture ({error})") from None


def pytest_configure(config: pytest.Config) -> None:
    progress.register(config)


@pytest.fixture(autouse=True)
def _compiled_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing comes from the compilation cache where a test, or its module, has the marker `compiles`."""
    if request.node.get_closest_marker("compiles") is None:
        yield
        return
    with compiled.anew():
        yield


@pytest.fixture
def given(request: pytest.FixtureRequest) -> Iterator[Given]:
    """What the pages leave to this test, all of which it must take."""
    given = Given(request.node.name, [each for each in everything() if way(each.page, each.name) == request.node.name])
    yield given
    assert not given.left, f"not executed, though ways.py says so: {[(each.page, each.name) for each in given.left]}"


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.close()


@pytest.fixture(scope="session")
def uninterrupted(jobs: Jobs) -> Run:
    """The reference: 2 processes with 2 devices each, left alone to the end. As all three here, compiled on its own."""
    run = jobs.new("2x2")
    wait_all([jobs.launch(run, 2, 2, **COMPILED_ANEW)])
    return run


@pytest.fixture(scope="session")
def single(jobs: Jobs) -> Run:
    """One process with one device; with its plots."""
    run = jobs.new("1x1")
    wait_all([jobs.train(run, "run.plots=true", **COMPILED_ANEW)])
    return run


@pytest.fixture(scope="session")
def four_processes(jobs: Jobs) -> Run:
    """Four processes with one device each."""
    run = jobs.new("4x1")
    wait_all(jobs.ranks(run, 4, 1, **COMPILED_ANEW))
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
