"""TFLOP/s and MFU: what is counted, and what is not claimed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpdist.program.flops import flops_per_example, peak_flops, speed


def programs(function: Any, *shapes: tuple[int, ...]) -> Any:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile()
    return SimpleNamespace(compiled=lambda: {"accumulate_8": program})


def test_operations_are_those_of_the_program_an_example() -> None:
    # 2 m k n of a product of [8, 64] and [64, 32], of 8 examples.
    assert flops_per_example(programs(jnp.matmul, (8, 64), (64, 32)), 8) == pytest.approx(2 * 64 * 32)


def test_a_program_with_a_loop_is_not_counted_by_one_pass() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ carry), None), x, length=50)[0]

    assert flops_per_example(programs(loop, (16, 16)), 8) is None


@pytest.mark.parametrize(
    ("kind", "platform", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", 989e12),
        ("Tesla V100-SXM2-32GB", "gpu", 15.7e12),
        ("NVIDIA GeForce RTX 4090", "gpu", None),
        ("cpu", "cpu", None),
    ],
)
def test_mfu_is_of_the_published_rate_and_only_of_known_gpus(kind: str, platform: str, peak: float | None) -> None:
    assert peak_flops(kind, platform) == peak
    told = speed(2e9, 4000.0, 4, kind, platform)
    assert told["tflops_per_device"] == 2.0
    assert told["mfu"] == (None if peak is None else 2e12 / peak)


def test_unknown_operations_are_no_rate() -> None:
    assert speed(None, 4000.0, 4, "NVIDIA H100", "gpu") == {"tflops_per_device": None, "mfu": None}
