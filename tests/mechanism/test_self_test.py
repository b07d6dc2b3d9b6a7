"""The self-test refuses programs whose guards a compiler has deleted, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_clipping import case, flat
from zoo import ZOO

from dpdist.data.units import MASK
from dpdist.mechanism.clipping import METHODS, clipped_grad_sum
from dpdist.models.tasks import next_token_loss
from dpdist.models.whole import over_records
from dpdist.program import self_test
from dpdist.program.self_test import BrokenGuardError

CLIP_NORM = 0.3
#: XLA may take out comparisons with NaN and infinity.
FAST = {"xla_cpu_enable_fast_math": True} | dict.fromkeys(
    ("xla_cpu_fast_math_honor_nans", "xla_cpu_fast_math_honor_infs"), False
)
GradSum = Callable[[Any, Any, Any], tuple[Any, Any]]


def compiled(grad_sum: GradSum, options: dict[str, Any]) -> self_test.Accumulate:
    """Runs each shape as a program compiled with XLA's `options`."""
    programs: dict[int, Any] = {}

    def accumulate(params: Any, batch: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        if len(mask) not in programs:
            lowered = jax.jit(grad_sum).lower(params, batch, mask)
            programs[len(mask)] = lowered.compile(compiler_options=options)
        return flat(programs[len(mask)](params, batch, mask)[0])

    return accumulate


def check(name: str, sum_of: Callable[[Any], GradSum], options: dict[str, Any], *sizes: int) -> None:
    loss_fn, params, batch = case(name) if name in ("mlp", "plain") else ZOO[name]()
    example = {column: jax.ShapeDtypeStruct(values.shape[1:], values.dtype) for column, values in batch.items()}
    self_test.check(compiled(sum_of(loss_fn), options), params, example, sizes, clip_norm=CLIP_NORM)


def by(method: str) -> Callable[[Any], GradSum]:
    return lambda loss_fn: clipped_grad_sum(loss_fn, clip_norm=CLIP_NORM, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "tied embeddings", "odd corners", "slices", "own derivatives"])
def test_programs_as_xla_compiles_them_pass(name: str, method: str) -> None:
    check(name, by(method), {}, 1, 2, 3, 8)


@pytest.mark.parametrize("method", ["per_example", "bookkeeping"])
@pytest.mark.parametrize("name", ["mlp", "tied embeddings"])
def test_programs_that_honour_no_nans_are_refused(name: str, method: str) -> None:
    """Of images, and of tokens, which hold no NaN."""
    with pytest.raises(BrokenGuardError, match="moved the sum of 8 rows by nan C"):
        check(name, by(method), FAST, 8)


def broken(weight: Callable[..., Any], keep: Callable[..., Any]) -> Callable[[Any], GradSum]:
    """`per_example` with guards of its own."""

    def sum_of(loss_fn: Any) -> GradSum:
        def grad_sum(params: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
            grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
            norms = jnp.sqrt(sum(jnp.sum(g.reshape(len(mask), -1) ** 2, axis=1) for g in jax.tree.leaves(grads)))
            used, scale = keep(mask, norms), weight(norms)

            def total(g: Any) -> Any:
                at = (len(mask),) + (1,) * (g.ndim - 1)
                return jnp.sum(jnp.where(used.reshape(at), g * scale.reshape(at), 0), axis=0)

            return jax.tree.map(total, grads), norms

        return grad_sum

    return sum_of


def clip(norms: Any) -> Any:
    return jnp.minimum(1, CLIP_NORM * (1 - 1e-5) / norms)


def guard(mask: Any, norms: Any) -> Any:
    return (mask > 0) & jnp.isfinite(norms)


def real(mask: Any, norms: Any) -> Any:
    return mask > 0


BROKEN = {
    "no clipping": (jnp.ones_like, guard, "moved"),
    "clipping to 1.01 C": (lambda norms: 1.01 * clip(norms), guard, "moved"),
    "no mask": (clip, lambda mask, norms: jnp.isfinite(norms), "padding of"),
    "no look at NaNs": (clip, real, "NaN"),
    "neighbours dropped": (
        clip,
        lambda mask, norms: guard(mask, norms) & jnp.all((norms < 1e9) | (mask <= 0)),
        "rows of",
    ),
}


def test_guards_written_otherwise_pass() -> None:
    check("mlp", broken(clip, guard), {}, 1, 2, 3, 8)


@pytest.mark.parametrize("name", BROKEN)
def test_every_guard_that_is_missing_is_noticed(name: str) -> None:
    weight, keep, what = BROKEN[name]
    with pytest.raises(BrokenGuardError, match=what):
        check("mlp", broken(weight, keep), {}, 8)


def unclipped(loss_fn: Any) -> GradSum:
    """A sum that leaves NaN out and bounds nothing."""

    def grad_sum(params: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        norms = jnp.sqrt(sum(jnp.sum(jnp.square(g.reshape(len(mask), -1)), 1) for g in jax.tree.leaves(gradients)))
        keep = (mask > 0) & jnp.isfinite(norms)
        return jax.tree.map(
            lambda g: jnp.sum(jnp.where(keep.reshape(-1, *[1] * (g.ndim - 1)), g, 0), 0), gradients
        ), norms

    return grad_sum


def a_unit() -> tuple[Any, Any, dict[str, Any]]:
    """Three records a unit, which a mask of zeros would leave out."""
    loss = over_records(lambda params, example: jnp.sum(jnp.square(example["x"] @ params["w"] - 1)), 3, MASK)
    example = {"x": jax.ShapeDtypeStruct((3, 4), np.float32), MASK: jax.ShapeDtypeStruct((3,), np.bool_)}
    return loss, {"w": np.ones((4, 2), np.float32)}, example


def a_text() -> tuple[Any, Any, dict[str, Any]]:
    """Tokens with a mask of padding."""

    def loss(params: Any, example: Any) -> Any:
        return next_token_loss(jnp.take(params["table"], example["input_ids"], axis=0), example)

    tokens = {name: jax.ShapeDtypeStruct((6,), np.int32) for name in ("input_ids", "attention_mask")}
    return loss, {"table": np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)}, tokens


@pytest.mark.parametrize("task", [a_unit, a_text])
def test_what_a_mask_leaves_out_is_tested_all_the_same(task: Callable[[], Any]) -> None:
    loss_fn, params, example = task()
    clipped = clipped_grad_sum(loss_fn, clip_norm=1e-3)
    self_test.check(compiled(clipped, {}), params, example, (4, 2), clip_norm=1e-3)
    with pytest.raises(BrokenGuardError, match="moved the sum"):
        self_test.check(compiled(unclipped(loss_fn), {}), params, example, (4, 2), clip_norm=1e-3)


@pytest.mark.parametrize("fmt", ["bfloat16", "tf32"])
def test_products_of_this_device_lose_no_more_than_the_bound_assumes(fmt: Any) -> None:
    assert 0 < self_test.largest_loss(fmt) <= 1


def test_a_device_whose_products_lose_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that accumulates in bfloat16 would."""

    def coarse(equation: str, a: Any, b: Any, fmt: Any) -> Any:
        blocks = [product(equation, a[:, i : i + 64], b[:, i : i + 64], fmt) for i in range(0, a.shape[1], 64)]
        total = jnp.zeros_like(blocks[0])
        for block in blocks:
            total = jax.lax.reduce_precision(total + block, exponent_bits=8, mantissa_bits=7)
        return total

    product = self_test.product
    monkeypatch.setattr(self_test, "product", coarse)
    with pytest.raises(BrokenGuardError, match=r"long products in tf32 lose .* times what the bound"):
        self_test.check_products(["tf32"])
