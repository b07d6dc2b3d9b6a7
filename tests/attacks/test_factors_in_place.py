"""Factors that are rounded in place: what else reads them must not notice, and what is not finite must not hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.clipping.flatten import call, inner, shape_of
from dpdist.mechanism.clipping.graph import trace
from dpdist.mechanism.clipping.strategy import smaller, strategies_of
from dpdist.mechanism.clipping.tensor_products import changes, fitted, roundings

Loss = Callable[[Any, Any], Any]
EXAMPLES, ROWS, WIDTH = 3, 4, 6
#: Precisions of which a tensor core rounds float32 operands.
ROUNDED = (None, (lax.Precision.DEFAULT,) * 2, (lax.Precision.HIGH,) * 2)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 2


def convolved(x: Any, kernel: Any, stride: int) -> Any:
    return lax.conv_general_dilated(x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


def with_itself(p: Any, e: Any) -> Any:
    """The same variable on both sides of a product, and in another."""
    return jnp.sum((e["x"] @ e["x"].T) @ jnp.tanh(e["x"] @ p["a"] @ p["b"]))


def asked_for_precision(p: Any, e: Any) -> Any:
    """A chain of products, each the operand of the next, some of which are not to be rounded."""
    h = jnp.matmul(e["x"], p["a"])
    h = jnp.matmul(h, p["b"], precision="highest")
    h = jnp.matmul(jnp.matmul(h, p["c"], precision=("highest", "default")), p["a"], precision="high")
    return jnp.sum(h * e["g"])


def read_elsewhere(p: Any, e: Any) -> Any:
    """A residual stream, whose sum products are not alone to read, and a tied, transposed parameter."""
    h = e["x"] @ p["a"]
    h = h + jnp.tanh(h @ p["b"]) @ p["a"].T
    return jnp.sum((h @ p["c"]) * e["g"]) + jnp.sum(jnp.sin(h))


def three_readers(p: Any, e: Any) -> Any:
    """An example's own leaf, read by a product, a convolution that skips pixels and one that does not."""
    x = e["x"][None] * 1
    dense = jnp.tensordot(x, p["a"][:, :2], axes=1)  # fewer columns than rows: the weight goes into G
    return jnp.sum(jnp.tanh(dense)) + sum(
        jnp.sum(jnp.tanh(convolved(x, p[k][None], s))) for k, s in (("b", 2), ("c", 1))
    )


def branches(p: Any, e: Any) -> Any:
    h = e["x"] @ p["a"]
    h = lax.cond(e["g"][0, 0] < 9, lambda h: h @ p["b"], lambda h: h, h)
    return jnp.sum(jax.checkpoint(lambda h, w: (h @ w) @ w)(h, p["c"]) * e["g"])


def formats(p: Any, e: Any) -> Any:
    """bfloat16 data into a float32 product, beside one that stays in bfloat16; float16 after it."""
    x = e["x"].astype(jnp.bfloat16)
    a, b = p["a"].astype(jnp.bfloat16), p["b"].astype(jnp.bfloat16)
    h = lax.dot_general(x, a, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    half = (h.astype(jnp.float16) @ p["c"].astype(jnp.float16)).astype(jnp.float32)
    return jnp.sum((half + (x @ b).astype(jnp.float32)) * e["g"])


def hidden_after(p: Any, e: Any) -> Any:
    """What is not finite is replaced behind the product, so that the gradient at it is 0."""
    y, z = e["x"] @ p["a"], e["x"] @ p["b"][:, :2]
    return jnp.sum(jnp.where(jnp.isfinite(y), y * e["g"], 0)) + jnp.sum(jnp.where(jnp.isnan(z), 0, z) @ p["c"][:2])


def arguments() -> tuple[Any, Any]:
    params = {name: jnp.asarray(normal(seed, WIDTH, WIDTH)) for seed, name in enumerate("abc")}
    return params, {name: normal(seed, EXAMPLES, ROWS, WIDTH) for seed, name in enumerate("xg", 7)}


def on_cores(jaxpr: Any, constants: Any, inputs: Any) -> list[Any]:
    """Evaluate a jaxpr where every product that may be rounds its float32 operands to TF32, as a tensor core does."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))
    for equation in jaxpr.eqns:
        read = [v.val if isinstance(v, Literal) else known[v] for v in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated") and params["precision"] in ROUNDED:
            read = [lax.reduce_precision(x, 8, 10) if x.dtype == jnp.float32 else x for x in read]
        if name in ("jit", "custom_vjp_call"):
            found = on_cores(*inner(params["jaxpr" if name == "jit" else "call_jaxpr"]), read)
        else:
            found = call(equation, read)
        known |= zip(equation.outvars, found, strict=True)
    return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


@pytest.mark.parametrize("loss", [with_itself, asked_for_precision, read_elsewhere, three_readers, formats])
def test_on_tensor_cores_no_bit_of_the_loss_or_of_a_gradient_tells_what_was_rounded_in_place(
    loss: Loss,
) -> None:
    params, batch = arguments()
    example = {k: jnp.asarray(x[0]) for k, x in batch.items()}
    graph = trace(loss, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example))
    leaves, factors = strategies_of(graph, params, smaller, {"b": "instantiate", "*": "ghost"})
    known = {u: each for u, each in enumerate(factors) if each is not None}
    ghosts = {u for leaf in leaves if leaf.strategy == "ghost" for group in leaf.groups for u in group}
    rounding = roundings(graph, known, ghosts, tensor=True)
    assert sum(each.operand + each.output for each in rounding.values()) >= 2
    shared = graph.compute_params(jax.tree.leaves(params))
    shifts = [[jnp.zeros_like(shape_of(use.equation.outvars[j])) for j in use.outputs] for use in graph.uses]
    inputs = [*jax.tree.leaves(example), jnp.float32(0)]

    def run(settle: Any) -> tuple[Any, list[Any]]:
        def gradients(*columns: Any) -> Any:
            value, back = jax.vjp(lambda shifts: graph.compute_loss(shared, columns, shifts, settle)[0], shifts)
            return value, [each for (each,) in back(jnp.ones_like(value))[0]]

        closed = jax.make_jaxpr(gradients)(*inputs)
        value, *found = on_cores(closed.jaxpr, closed.consts, inputs)
        return value, found

    (value, plain), (settled, changed) = run({}), run(changes(graph, known, rounding))
    assert value == settled
    for u, (before, after) in enumerate(zip(plain, changed, strict=True)):
        expected = fitted(before, rounding[u].fmt) if u in rounding and rounding[u].output else before
        assert (np.asarray(expected) == np.asarray(after)).all(), u


@pytest.mark.parametrize("ghosts", ["[abc]", "b"])
@pytest.mark.parametrize("loss", [three_readers, branches, formats, hidden_after])
def test_what_is_not_finite_in_one_factor_shows_even_where_the_other_is_0(loss: Loss, ghosts: str) -> None:
    """In one row of A or of G, with or without a row of zeros opposite; others' sums keep every bit."""
    params, batch = arguments()
    strategies = {ghosts: "ghost", "*": "instantiate"}
    function = jax.jit(clipped_grad_sum(loss, clip_norm=0.3, precision="tensor", strategies=strategies))
    mask, alone = np.ones(EXAMPLES, np.float32), np.float32([0, 1, 0])
    gradient = jax.jit(lambda e: jax.grad(loss)(params, e))

    def summed(batch: Any, mask: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(function(params, batch, mask)[0])])

    expected, left_out = summed(batch, mask - alone), 0
    assert 0.2 < np.linalg.norm(summed(batch, alone)) <= 0.3
    for name, opposite in (("x", "g"), ("g", "x")):
        for bad in (np.nan, np.inf, 3e38):
            for zeros in (False, True):
                spoilt = {k: x.copy() for k, x in batch.items()}
                spoilt[name][1, 1, 2] = bad
                spoilt[opposite][1, 1] *= not zeros
                assert (summed(spoilt, mask - alone) == expected).all()
                reference = jax.tree.leaves(gradient({k: x[1] for k, x in spoilt.items()}))
                if not all(np.isfinite(x).all() for x in reference):
                    left_out += 1
                    assert not summed(spoilt, alone).any()
                    assert (summed(spoilt, mask) == expected).all()
                assert np.linalg.norm(summed(spoilt, alone)) <= 0.3
    assert left_out >= 4
