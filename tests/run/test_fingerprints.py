"""What decides bits counts, whoever sets it; what does not may differ."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from dpdist.run.fingerprints import VARIABLES, environment, numeric_settings


@pytest.fixture(autouse=True)
def _no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", *VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["XLA_FLAGS", *VARIABLES])
def test_every_variable_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = environment("cpu")
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    assert numeric_settings()[name] == "--xla_cpu_enable_fast_math=true"
    assert environment("cpu") != before


def test_a_setting_of_jax_counts() -> None:
    before = environment("cpu")
    with jax.default_matmul_precision("highest"):
        assert environment("cpu") != before
    with jax.threefry_partitionable(False):  # as the user's own module may set it, after joining
        assert environment("cpu") != before
    assert environment("cpu") == before


def test_flags_that_decide_no_bits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment("cpu")
    free = "--xla_force_host_platform_device_count=4 --xla_dump_to='/a b'"
    monkeypatch.setenv("XLA_FLAGS", free)
    assert environment("cpu") == before
    monkeypatch.setenv("XLA_FLAGS", f"{free} --xla_x=1 ")
    assert numeric_settings()["XLA_FLAGS"] == "--xla_x=1"


def test_flags_in_a_file_are_read_as_xla_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flags").write_text("--xla_x=1\n--xla_dump_to=/a\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert numeric_settings()["XLA_FLAGS"] == "--xla_x=1"
