"""Where a run keeps its compiled programs for the next start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compiled
import jax
import jax.numpy as jnp
import pytest

from dpdist.config.schema import Cluster
from dpdist.errors import InputError
from dpdist.run import opening
from dpdist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    """A run directory; what is compiled for the test goes nowhere else."""
    monkeypatch.setattr(opening, "_WORTH_KEEPING", 0.0)
    names = ("jax_compilation_cache_dir", *compiled.settings(tmp_path))
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    opening._found_cache.cache_clear()
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    opening._found_cache.cache_clear()
    opening.compilation_cache.reset_cache()


def kept(run: RunDirectory, platform: str, **cluster: Any) -> list[str]:
    """The names of the programs that are kept below the run when one is compiled."""
    world: Any = SimpleNamespace(platform=platform, is_main=True, num_processes=1, timeout=60)
    config: Any = SimpleNamespace(cluster=Cluster(**cluster))
    opening.open_cache(config, run, world)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    @jax.jit
    def a_step(x: jax.Array) -> jax.Array:
        return x + len(str(run.root))  # no two tests compile the same

    a_step(jnp.zeros(3)).block_until_ready()
    return sorted(path.name for path in run.root.rglob("*a_step*"))


def test_a_gpu_run_keeps_them_in_its_private_part(run: RunDirectory) -> None:
    (name,) = kept(run, "gpu")
    assert name.endswith("-cache")
    assert run.compiled.parent == run.private
    assert (run.compiled / name).exists()
    assert run.private.stat().st_mode & 0o077 == 0


def test_programs_for_a_cpu_are_not_kept_unless_a_directory_is_named(run: RunDirectory) -> None:
    assert kept(run, "cpu") == []
    assert len(kept(run, "cpu", compilation_cache=str(run.root / "private/mine"))) == 1


def test_none_are_kept_where_so_asked_or_where_the_environment_names_a_place(run: RunDirectory, tmp_path: Path) -> None:
    assert kept(run, "gpu", compilation_cache=None) == []
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "elsewhere"))
    opening._found_cache.cache_clear()
    assert kept(run, "gpu") == []
    assert len(list((tmp_path / "elsewhere").glob("*a_step*"))) == 1


def test_two_runs_of_one_process_keep_theirs_apart(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other")
    other.prepare()
    assert len(kept(run, "gpu")) == 1
    assert len(kept(other, "gpu")) == 1
    assert kept(run, "gpu", compilation_cache=None) == kept(run, "gpu")  # not one more


def test_a_directory_that_others_can_write_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InputError, match="can be written by others"):
        kept(run, "cpu", compilation_cache=str(shared))
    shared.chmod(0o775)  # our own group
    assert kept(run, "cpu", compilation_cache=str(shared)) == []
