"""Where a run keeps its compiled programs for the next start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import xla_client

from dpdist.config.schema import Cluster
from dpdist.errors import InputError
from dpdist.run import compiled as programs
from dpdist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    """A run directory; what is compiled for the test goes nowhere else."""
    monkeypatch.setattr(programs, "_WORTH_KEEPING", 0.0)
    names = ("jax_compilation_cache_dir", *compiled.settings(tmp_path))
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    programs._found_cache.cache_clear()
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    programs._found_cache.cache_clear()
    programs.compilation_cache.reset_cache()


def kept(run: RunDirectory, platform: str, **cluster: Any) -> list[str]:
    """The names of the programs that are kept below the run when one is compiled."""
    world: Any = SimpleNamespace(platform=platform, is_main=True, num_processes=1, timeout=60)
    config: Any = SimpleNamespace(cluster=Cluster(**cluster))
    programs.open_cache(config, run, world)
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
    programs._found_cache.cache_clear()
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


def test_a_program_for_a_cpu_has_another_key_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_hash_accelerator_config", "_hash_serialized_compile_options"):
        monkeypatch.setattr(programs.cache_key, name, getattr(programs.cache_key, name))  # put back after the test
    programs._key_by_processor.__wrapped__()
    first, *others = jax.devices()
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    module, options = lowered.compiler_ir(), xla_client.CompileOptions()

    def key(device: Any) -> str:
        return programs.cache_key.get(module, np.array([device]), options, first.client)

    here = key(first)
    assert here == key(first)
    assert all(key(other) != here for other in others)
    monkeypatch.setattr(programs, "processor", lambda: "another")
    assert key(first) != here
