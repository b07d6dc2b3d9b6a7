"""The table of devices: the name decides, so that two runs on equal devices choose alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.program.device_rates import TWO_CORES, device_rates, faster
from dpdist.program.gradients import choose_strategies


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("Tesla V100-SXM2-32GB", 7.8e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12),
        ("NVIDIA H100 80GB HBM3", 9.5e12),
        ("NVIDIA H200", 9.5e12),
        ("NVIDIA GeForce RTX 4090", 0.5e12),
    ],
)
def test_a_gpu_is_found_by_a_part_of_its_name(kind: str, flops: float) -> None:
    assert device_rates(kind, "gpu").flops_float64 == flops


def test_a_cpu_is_a_cpu_whatever_it_is_called() -> None:
    assert device_rates("cpu", "cpu") is TWO_CORES


@pytest.mark.parametrize(
    ("length", "m", "n", "strategy"),
    [
        (197, 768, 3072, "instantiate"),  # ViT-B: 60 ms with these instantiated, 77 with `ghost`
        (128, 768, 768, "instantiate"),  # BERT-base: 79 ms, 91 with `ghost`
        (1, 768, 1000, "ghost"),
    ],
)
def test_an_h100_chooses_what_was_faster_on_one(length: int, m: int, n: int, strategy: str) -> None:
    """As in docs/results/gpu-h100: float64 inner products are far from the published rate."""
    rates = device_rates("NVIDIA H100 80GB HBM3", "gpu")
    params = {"w": np.zeros((m, n), np.float32)}
    example = jax.ShapeDtypeStruct((length, m), np.float32)
    (leaf,) = choose_strategies(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])), params, example, prefer=faster(rates))
    assert leaf.strategy == strategy
