"""The table of devices: the name decides, so that two runs on equal devices choose alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.program.device_rates import TWO_CORES, device_rates, faster, has_tensor_cores
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


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [("gpu", "7.0", False), ("gpu", "8.0", True), ("gpu", "9.0", True), ("gpu", "gfx942", False), ("cpu", None, False)],
)
def test_tensor_cores_for_short_formats_came_with_compute_capability_8(
    platform: str, capability: str | None, has: bool
) -> None:
    device = SimpleNamespace(platform=platform, **({} if capability is None else {"compute_capability": capability}))
    assert has_tensor_cores(device) is has


def test_an_h100_takes_inner_products_on_tensor_cores_where_it_instantiates_in_float64() -> None:
    rates = device_rates("NVIDIA H100 80GB HBM3", "gpu")
    params, example = {"w": np.zeros((768, 3072), np.float32)}, jax.ShapeDtypeStruct((197, 768), np.float32)
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))  # noqa: E731
    chosen = [
        choose_strategies(loss, params, example, prefer=faster(rates, tensor=tensor))[0].strategy
        for tensor in (False, True)
    ]
    assert chosen == ["instantiate", "ghost"]


def test_a_table_that_also_computes_the_logits_costs_as_that_product_does() -> None:
    """Its first use, the lookup, has a one-hot factor, which costs nothing."""
    table, tokens = {"table": np.zeros((5000, 64), np.float32)}, jax.ShapeDtypeStruct((32,), np.int32)

    def tied(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(params["table"][ids] @ params["table"].T))

    def logits(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(jax.nn.one_hot(ids, 64) @ params["table"].T))

    prefer = faster(device_rates("NVIDIA A100-SXM4-80GB", "gpu"))
    (both,), (alone,) = (choose_strategies(loss, table, tokens, prefer=prefer) for loss in (tied, logits))
    assert [len(group) for group in both.groups] == [2]
    assert dict(both.seconds)["ghost"] > dict(alone.seconds)["ghost"] > 0
