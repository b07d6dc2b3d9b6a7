"""Initial parameters are drawn on the host, also where another device is the default. There is no GPU here: the second
of two CPU devices stands for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpdist import config
from dpdist.data import open_dataset
from dpdist.program import host
from dpdist.program.build import open_model
from dpdist.program.host import on_the_host
from dpdist.program.update import initial_state


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A default device that is not the host's first."""
    device = jax.devices()[1]
    monkeypatch.setattr(host.jax, "default_backend", lambda: "gpu")
    with jax.default_device(device):
        yield device


def settings() -> config.Config:
    return config.from_dict(
        {
            "data": {"source": "digits"},
            "model": {"name": "mlp"},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-5},
            "sampling": {"expected_batch_size": 32},
            "training": {"steps": 2},
        }
    )


def places(tree: Any) -> set[Any]:
    return {leaf.device for leaf in jax.tree.leaves(tree)}


def test_parameters_and_optimizer_state_are_made_on_the_host_and_move_freely(elsewhere: Any) -> None:
    given = settings()
    params = open_model(given, open_dataset(given.data)).params
    with on_the_host():
        state = initial_state(params, optax.adam(0.1), averaged=True)
    assert places((params, state)) == {jax.devices()[0]}
    # Nothing is tied to the host: what computes with them runs on the default device.
    assert places(jax.tree.map(lambda x: jnp.sin(x) + jnp.ones(()), params)) == {elsewhere}


def test_they_are_those_of_a_run_on_a_processor() -> None:
    given = settings()
    dataset = open_dataset(given.data)
    expected = open_model(given, dataset).params
    with pytest.MonkeyPatch.context() as patch, jax.default_device(jax.devices()[1]):
        patch.setattr(host.jax, "default_backend", lambda: "gpu")
        found = open_model(given, dataset).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_compiled_on_the_host_is_not_kept_for_another_processor(elsewhere: Any, tmp_path: Path) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    names += ("jax_persistent_cache_min_entry_size_bytes",)
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0.0, -1), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        with on_the_host():
            jax.jit(lambda x: jnp.cos(x) * 17)(jnp.ones(3)).block_until_ready()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: jnp.cos(x) * 18)(jnp.ones(3)).block_until_ready()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_without_a_backend_for_the_processor_the_device_draws(elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(backend: str) -> Any:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(host.jax, "local_devices", none)
    with on_the_host():
        assert places(jnp.ones(3) + 1) == {elsewhere}
