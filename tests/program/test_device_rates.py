"""The table of devices: the name decides, so that two runs on equal devices choose alike."""

from __future__ import annotations

import pytest

from dpdist.mechanism.clipping import TWO_CORES
from dpdist.program.device_rates import device_rates


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("Tesla V100-SXM2-32GB", 7.8e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12),
        ("NVIDIA H100 80GB HBM3", 67e12),
        ("NVIDIA H200", 67e12),
        ("NVIDIA GeForce RTX 4090", 0.5e12),
    ],
)
def test_a_gpu_is_found_by_a_part_of_its_name(kind: str, flops: float) -> None:
    assert device_rates(kind, "gpu").flops_float64 == flops


def test_a_cpu_is_a_cpu_whatever_it_is_called() -> None:
    assert device_rates("cpu", "cpu") is TWO_CORES
