"""Uses of parameters on which clipping went wrong, or stopped, when it was attacked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpdist.mechanism.clipping import clipped_grad_sum

RANDOM = np.random.default_rng(0)
WAYS = ({}, {"strategies": {"*": "ghost"}}, {"strategies": {"*": "instantiate"}}, {"method": "ghost"})


def require_reference(loss: Any, params: Any, batch: Any, examples: int) -> None:
    """Compare every way with `vmap(grad)`, at a C that clips some."""
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    flat = np.concatenate([np.asarray(x, np.float64).reshape(examples, -1) for x in jax.tree.leaves(gradients)], 1)
    norms = np.linalg.norm(flat, axis=1)
    clip_norm = float(np.median(norms))
    expected = np.sum(flat * np.minimum(1, clip_norm / norms)[:, None], 0)
    for how in WAYS:
        for precision, tolerance in (("highest", 2e-5), ("tensor", 4e-3)):
            function = jax.jit(clipped_grad_sum(loss, clip_norm=clip_norm, precision=precision, **how))
            sums, _ = function(params, batch, np.ones(examples, np.float32))
            found = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(sums)])
            assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected), (how, precision)


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32])
def test_row_numbers_of_a_type_that_cannot_hold_the_tables_length(dtype: Any, mode: str) -> None:
    """Of 400 rows, the bound wrapped to 144 in uint8: rows from there on counted as outside; the gradient was wrong."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
    params = {"table": RANDOM.normal(size=(400, 3)).astype(np.float32)}
    batch = {
        "ids": RANDOM.integers(0, np.iinfo(np.int8).max if dtype == np.int8 else 255, (4, 5, 1)).astype(dtype),
        "y": RANDOM.normal(size=(4, 5, 3)).astype(np.float32),
    }

    def loss(params: Any, example: Any) -> Any:
        rows = lax.gather(params["table"], example["ids"], numbers, (1, 3), mode=mode)
        return jnp.sum((rows - example["y"]) ** 2)

    require_reference(loss, params, batch, 4)


def test_a_scan_of_no_steps_with_stacked_outputs() -> None:
    params = {"w": RANDOM.normal(size=(3, 3)).astype(np.float32)}
    batch = {"x": RANDOM.normal(size=(4, 3)).astype(np.float32)}

    def loss(params: Any, example: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            return jnp.tanh(x @ params["w"]), x @ params["w"]

        last, rows = lax.scan(step, example["x"], None, length=0)
        return jnp.sum((last @ params["w"]) ** 2) + jnp.sum(rows)

    require_reference(loss, params, batch, 4)


def test_a_grouped_convolution_tied_with_its_transpose() -> None:
    """Transposed, the kernel's groups divide its other features."""
    params = {"k": RANDOM.normal(size=(1, 1, 2, 4)).astype(np.float32)}
    batch = {"x": RANDOM.normal(size=(4, 1, 5, 5, 4)).astype(np.float32)}

    def convolved(x: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)

    def loss(params: Any, example: Any) -> Any:
        first = convolved(example["x"], params["k"])
        # The kernel's transpose has 4 inputs a group and 2 outputs: a use of it on twice the channels.
        doubled = jnp.concatenate([first, first], -1)
        return jnp.sum(jnp.tanh(convolved(doubled, jnp.swapaxes(params["k"], 2, 3))) ** 2)

    require_reference(loss, params, batch, 4)
