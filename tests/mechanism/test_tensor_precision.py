"""`precision="tensor"`: the sums of every loss of the zoo, no example over C, and what is compiled for it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal
from test_clipping import clipped, flat
from test_clipping_methods import MASK, reference
from zoo import EXAMPLES, ZOO, mixed_precision, normal

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.clipping.flatten import Origin, flatten
from dpdist.mechanism.clipping.separate import source_of
from dpdist.mechanism.clipping.tensor_cores import LONGEST
from dpdist.mechanism.clipping.weights import largest_terms

#: Two roundings to TF32 an entry, and what the bound takes off C.
TOLERANCE = 2.0**-9


def tensor(loss_fn: Any, clip_norm: float, strategy: str = "ghost") -> Any:
    return jax.jit(clipped_grad_sum(loss_fn, clip_norm=clip_norm, precision="tensor", strategies={"*": strategy}))


def alone(function: Any, params: Any, batch: Any) -> np.ndarray:
    """Return the norm in float64 of what each example adds where all others are masked."""
    masks = np.eye(len(jax.tree.leaves(batch)[0]), dtype=np.float32)
    return np.array([np.linalg.norm(flat(function(params, batch, mask)[0])) for mask in masks])


@pytest.mark.parametrize("strategy", ["ghost", "instantiate"])
@pytest.mark.parametrize("name", ZOO)
def test_sums_are_close_to_the_references_and_no_example_adds_more_than_c(name: str, strategy: str) -> None:
    (loss_fn, params, batch), gradients, norms, clip_norm = reference(name)
    function = tensor(loss_fn, clip_norm, strategy)
    expected = clipped(gradients, MASK, clip_norm)
    sums, found = function(params, batch, MASK)
    assert np.linalg.norm(flat(sums) - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert np.abs(np.asarray(found) / norms - 1).max() < TOLERANCE
    added = alone(function, params, batch)
    assert added.max() <= clip_norm
    assert (added[norms > clip_norm] >= (1 - TOLERANCE) * clip_norm).all()
    if any(np.issubdtype(column.dtype, np.floating) for column in batch.values()):
        bad = {k: x.copy() for k, x in batch.items()}
        for column in (x for x in bad.values() if np.issubdtype(x.dtype, np.floating)):
            column[3] = np.nan
        expected = clipped(gradients, MASK * (np.arange(EXAMPLES) != 3), clip_norm)
        assert np.linalg.norm(flat(function(params, bad, MASK)[0]) - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_a_model_in_bfloat16_is_clipped_from_bfloat16_factors() -> None:
    loss_fn, params, batch = mixed_precision()
    function = tensor(loss_fn, 0.05)
    added = alone(function, params, batch)
    assert added.max() <= 0.05
    assert added.min() >= 0.05 * (1 - 2.0**-5)
    products = factor_products(function, params, batch, MASK)
    # Of the dense layer's rows of 6 and of 8 columns, and of the convolution's: patches of 24, and 4 channels.
    shapes = {(each.invars[0].aval.dtype.name, each.invars[0].aval.shape[-1]) for each in products}
    assert shapes >= {("bfloat16", 6), ("bfloat16", 8), ("bfloat16", 24), ("bfloat16", 4)}
    assert {dtype for dtype, _ in shapes} == {"bfloat16"}


def test_rows_longer_than_a_product_may_be_are_multiplied_in_pieces() -> None:
    params = {"w": normal(1, LONGEST + 900, 3)}
    batch = {"x": normal(2, 4, 2, LONGEST + 900)}
    loss_fn = lambda p, e: jnp.sum(jnp.tanh(e["x"] @ p["w"]) ** 2)  # noqa: E731
    function = tensor(loss_fn, 0.5)
    exact = jax.jit(clipped_grad_sum(loss_fn, clip_norm=0.5))
    mask = np.ones(4, np.float32)
    sums, expected = flat(function(params, batch, mask)[0]), flat(exact(params, batch, mask)[0])
    assert np.linalg.norm(sums - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert alone(function, params, batch).max() <= 0.5


@pytest.mark.parametrize("precision", ["highest", "tensor"])
def test_the_terms_of_an_example_whose_rows_cancel_are_capped(precision: str) -> None:
    """Two rows that cancel but for one part in 300: weighted by C over its norm, its terms would be 300 C and more."""
    rows = np.array([[1.0], [-1.0]], np.float32) * np.ones((1, 8), np.float32)
    rows[0] *= 1 + 2.0**-7
    batch = {"a": np.stack([np.ones((2, 8), np.float32)] * 2), "b": np.stack([rows, 2.0**-7 * rows])}
    loss_fn = lambda p, e: jnp.sum((e["a"] @ p) * e["b"])  # noqa: E731
    clip_norm = 0.01
    function = clipped_grad_sum(loss_fn, clip_norm=clip_norm, precision=precision, strategies={"*": "ghost"})
    terms = 8 * (2 + 2.0**-7)
    for size, mask in ((1.0, [1.0, 0.0]), (2.0**-7, [0.0, 1.0])):
        norm = 8 * 2.0**-7 * size
        assert norm > clip_norm or size < 1
        weight = min(1.0, clip_norm / norm, largest_terms(2) * clip_norm / (terms * size))
        found = np.linalg.norm(flat(jax.jit(function)(np.zeros((8, 8), np.float32), batch, np.float32(mask))[0]))
        assert found == pytest.approx(weight * norm, rel=2e-2)
        assert weight * terms * size <= largest_terms(2) * clip_norm * (1 + 1e-9)


def attention_like() -> tuple[Any, Any, Any]:
    """Three products of the same 5 rows of 7 columns."""
    params = {name: normal(seed, 7, 9) for seed, name in enumerate("qkv")}

    def loss(p: Any, e: Any) -> Any:
        q, k, v = (e["x"] @ p[name] for name in "qkv")
        return jnp.sum((jnp.tanh(q @ k.T) @ v) ** 2)

    return loss, params, {"x": normal(9, 4, 5, 7)}


def gated(dtype: Any) -> tuple[Any, Any, Any]:
    """Three products of the same 5 rows, computed in a format. (XLA lacks some of attention's in bfloat16, on CPUs.)"""
    _, params, batch = attention_like()

    def loss(p: Any, e: Any) -> Any:
        x = e["x"].astype(dtype)
        q, k, v = (x @ p[name].astype(dtype) for name in "qkv")
        return jnp.sum((jnp.tanh(q * k) * v).astype(jnp.float32) ** 2)

    return loss, params, batch


def test_uses_of_the_same_data_share_one_product_of_its_rows() -> None:
    """In the program that XLA makes: one A A^T for q, k and v, and a G G^T each; each gradient is summed by one."""
    loss_fn, params, batch = attention_like()
    mask = np.ones(4, np.float32)
    text = tensor(loss_fn, 0.3).lower(params, batch, mask).compile().as_text()
    own = re.findall(r"= f32\[4,5,5\]\S* dot\((\S+), \1\), .*operand_precision={high,high}", text)
    assert len(own) == 4


def test_both_factors_of_a_product_go_through_reduce_precision_and_products_have_float32_output() -> None:
    """So that norm and sum see the same rounded operands, whatever pairs of casts a compiler drops."""
    loss_fn, params, batch = attention_like()
    found = factor_products(tensor(loss_fn, 0.3), params, batch, np.ones(4, np.float32))
    # For each parameter: two inner products of rows for the norms, the same two for the terms, and a weighted sum.
    assert len(found) == 3 * 5
    assert all(each.outvars[0].aval.dtype == jnp.float32 for each in found)


def traced(function: Any, *arguments: Any) -> list[Any]:
    """The equations of a traced gradient sum, with every call inlined."""
    closed = jax.make_jaxpr(function)(*arguments)
    parameter = Origin(leaves=frozenset({0}))  # so that every call is inlined
    equations: list[Any] = flatten(closed, [parameter] * len(closed.jaxpr.invars)).jaxpr.eqns
    return equations


#: Operations that only move the entries of their first input.
MOVES = (
    "reshape",
    "transpose",
    "slice",
    "squeeze",
    "broadcast_in_dim",
    "concatenate",
    "gather",
    "bitcast_convert_type",
)


def origin_of(v: Any, made: dict[Any, Any], through: tuple[str, ...] = MOVES) -> Any:
    while v in made and made[v].primitive.name in (*through, "optimization_barrier"):
        v = made[v].invars[made[v].outvars.index(v)]  # the barrier has more than one of either
    return v


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_loss_reads_the_arrays_that_clipping_reads(dtype: Any) -> None:
    """Not copies of them: each factor is moved from an operand of one of the loss's own products."""
    loss_fn, params, batch = gated(dtype)
    equations = traced(tensor(loss_fn, 0.3), params, batch, np.ones(4, np.float32))
    made = {v: equation for equation in equations for v in equation.outvars}
    products = [x for x in equations if x.primitive.name == "dot_general"]
    of_clipping = [x for x in products if "tensor_products.py" in source_of(x)]
    of_loss = {origin_of(v, made) for x in products if x not in of_clipping for v in x.invars}
    # x once, and the gradients at q, k and v. The loss multiplies these only for its gradient at x, which nobody needs.
    read = {origin_of(x.invars[0], made) for x in of_clipping if x.invars[0] is x.invars[1]}
    assert len(read) == 4
    assert len(read & of_loss) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_inner_products_of_data_wait_for_the_backward_pass(dtype: Any) -> None:
    """Else XLA takes them in the forward pass, and their [t, t] of every layer are in memory at its end."""
    loss_fn, params, batch = gated(dtype)
    equations = traced(tensor(loss_fn, 0.3), params, batch, np.ones(4, np.float32))
    (barrier,) = [x for x in equations if x.primitive.name == "optimization_barrier"]
    data, gradient = (v.aval.shape for v in barrier.invars)
    assert (data, gradient) == ((4, 5, 7), (4, 5, 9))
    made = {v: equation for equation in equations for v in equation.outvars}
    squares = [x for x in equations if x.primitive.name == "dot_general" and x.invars[0] is x.invars[1]]
    of_data = [x.invars[0] for x in squares if x.invars[0].aval.shape[-1] == 7]
    assert of_data
    for v in of_data:
        while made[v].primitive.name != "optimization_barrier":
            v = made[v].invars[0]
        assert made[v].outvars[0] is v


@pytest.mark.parametrize(
    ("precision", "also", "exact"),
    [(None, "", False), ("high", "", False), ("highest", "", True), (None, "sum", True), (None, "dot", True)],
)
def test_a_float32_value_is_rounded_in_place_only_where_products_alone_read_it(
    precision: Any, also: str, exact: bool
) -> None:
    """A core rounds 1 + 2^-12 to 1 for a product, unless it is asked not to; nobody rounds it for anything else."""

    def loss(p: Any, e: Any) -> Any:
        x = e["x"] * e["x"]
        y = jnp.matmul(x, p["w"], precision=precision) - 4096
        with_itself = partial(lax.dot_general, x, x, (((0, 1), (0, 1)), ((), ())))
        also_reads = {"": lambda: 0, "sum": lambda: jnp.sum(x), "dot": with_itself}
        return jnp.sum(y**2) + also_reads[also]() * p["s"]

    batch = {"x": np.sqrt(np.full((1, 3, 1), 1 + 2.0**-12)).astype(np.float32)}
    params = {"w": np.full((1, 1), 4096, np.float32), "s": np.float32(0)}
    assert batch["x"][0, 0, 0] ** 2 == np.float32(1 + 2.0**-12)
    sums, _ = clipped_grad_sum(loss, clip_norm=100.0, precision="tensor", strategies={"w": "ghost"})(
        params, batch, np.ones(1, np.float32)
    )
    # The gradient at y is 2 (y - 4096), three times, where the loss read 1 + 2^-12, and 0 where it read 1.
    np.testing.assert_allclose(sums["w"], 6.0 if exact else 0.0, rtol=1e-2)
    np.testing.assert_allclose(
        sums["s"], {"": 0, "sum": 3 + 3 * 2.0**-12, "dot": 3 + 6 * 2.0**-12}[also], rtol=2.0**-16
    )


@pytest.mark.parametrize(("m", "n", "side"), [(4, 32, 0), (32, 4, 1), (32, 32, 0)])
def test_the_weight_goes_into_the_smaller_factor_and_the_bound_knows_which(m: int, n: int, side: int) -> None:
    """Rows of the larger are orthogonal, others equal: with the sides confused the bound would take 5 u, not u."""
    wide, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((max(m, n), 25)))
    same = np.ones((25, min(m, n)))
    x, g = (same, wide.T) if side == 0 else (wide.T, same)
    batch = {"x": x[None].astype(jnp.bfloat16), "g": g[None].astype(jnp.bfloat16)}
    params, mask = {"w": np.zeros((m, n), np.float32)}, np.ones(1, np.float32)
    loss_fn = lambda p, e: jnp.sum((e["x"] @ p["w"].astype(jnp.bfloat16)) * e["g"])  # noqa: E731
    function = tensor(loss_fn, 0.1)
    equations = traced(function, params, batch, mask)
    made = {v: equation for equation in equations for v in equation.outvars}
    (summed,) = [x for x in equations if x.primitive.name == "dot_general" and x.outvars[0].aval.shape == (1, m, n)]
    weighted = [made[origin_of(v, made, (*MOVES, "convert_element_type", "reduce_precision"))] for v in summed.invars]
    assert [equation.primitive.name == "select_n" for equation in weighted] == [side == 0, side == 1]
    assert 0.1 * (1 - 2.5 * 2.0**-8) <= alone(function, params, batch)[0] <= 0.1


@pytest.mark.parametrize("strategy", ["ghost", "instantiate"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("short", [True, False])
def test_an_example_that_is_not_finite_changes_no_bit_of_the_others_sum(strategy: str, bad: float, short: bool) -> None:
    """Its factors become finite numbers where the others are summed beside them; it is left out all the same."""
    loss_fn, params, batch = gated(jnp.bfloat16 if short else jnp.float32)
    function = tensor(loss_fn, 0.3, strategy)
    mask, without = np.ones(4, np.float32), np.arange(4) != 1
    expected = flat(function(params, batch, mask * without)[0])
    for rows in (np.s_[1], np.s_[1, 0]):
        spoilt = {"x": batch["x"].copy()}
        spoilt["x"][rows] = bad
        for weights in (mask, mask * without):  # masked, it may hold anything too
            assert (flat(function(params, spoilt, weights)[0]) == expected).all()


@pytest.mark.parametrize("strategy", ["ghost", "instantiate"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_example_is_left_out_even_if_its_finite_stand_in_has_an_ordinary_gradient(strategy: str, dtype: Any) -> None:
    batch = {"x": normal(1, 3, 2, 8).astype(dtype), "g": (normal(2, 3, 2, 4) * 1e-30).astype(dtype)}
    batch["g"][:2] = normal(3, 2, 2, 4)
    loss_fn = lambda p, e: jnp.sum((e["x"] @ p["w"].astype(dtype)) * e["g"])  # noqa: E731
    function, params = tensor(loss_fn, 0.1, strategy), {"w": np.zeros((8, 4), np.float32)}
    expected = flat(function(params, batch, np.float32([1, 1, 0]))[0])
    batch["x"][2, 1, 3] = np.nan
    assert (flat(function(params, batch, np.ones(3, np.float32))[0]) == expected).all()


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_example_is_left_out_whose_data_an_instantiated_product_reads_too(names: str, dtype: Any) -> None:
    """`b` needs no finite stand-in, but `a` has the weight in its other factor: 0 times NaN would be in the sum."""
    batch, mask = {"x": normal(1, 3, 2, 8).astype(dtype)}, np.float32([1, 0, 1])

    def loss(p: Any, e: Any) -> Any:
        return sum(jnp.sum(jnp.tanh(e["x"] @ p[name].astype(dtype)).astype(jnp.float32)) for name in names)

    params = {"a": normal(2, 8, 4), "b": normal(3, 8, 4)}
    how = {"a": "ghost", "b": "instantiate"}
    function = jax.jit(clipped_grad_sum(loss, clip_norm=0.5, precision="tensor", strategies=how))
    expected = flat(function(params, batch, mask)[0])
    batch["x"][1, 1, 3] = np.nan
    assert (flat(function(params, batch, np.ones(3, np.float32))[0]) == expected).all()
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("term", ["instantiate", "mean"])
def test_a_pixel_that_a_convolution_skips_is_not_made_finite_for_what_reads_it(term: str) -> None:
    """It is in none of the convolution's inner products, so nothing would tell that the rest of the gradient is not."""
    params = {"short": normal(1, 1, 1, 3, 16), "main": normal(2, 3, 3, 3, 4)}

    def loss(p: Any, e: Any) -> Any:
        x = e["x"].astype(jnp.bfloat16)[None]

        def convolved(kernel: Any, stride: int, padding: str) -> Any:
            numbers = ("NHWC", "HWIO", "NHWC")
            kernel = kernel.astype(jnp.bfloat16)
            return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)

        skipping = jnp.sum(jnp.tanh(convolved(p["short"], 2, "VALID").astype(jnp.float32)))
        if term == "mean":
            return skipping * jnp.tanh(jnp.mean(x.astype(jnp.float32)))
        return skipping + jnp.sum(jnp.tanh(convolved(p["main"], 1, "SAME").astype(jnp.float32)))

    how = {"short": "ghost", "*": "instantiate"}
    function = jax.jit(clipped_grad_sum(loss, clip_norm=0.5, precision="tensor", strategies=how))
    batch = {"x": normal(3, 3, 6, 6, 3)}
    expected = flat(function(params, batch, np.float32([1, 0, 1]))[0])
    assert np.linalg.norm(flat(function(params, batch, np.float32([0, 1, 0]))[0])) > 0.4
    batch["x"][1, 1, 1] = np.nan
    assert not flat(function(params, batch, np.float32([0, 1, 0]))[0]).any()
    assert (flat(function(params, batch, np.ones(3, np.float32))[0]) == expected).all()


def factor_products(function: Any, *arguments: Any) -> list[Any]:
    """The products of factors in a traced gradient sum; fails where an operand is not rounded by `reduce_precision`."""
    equations = traced(function, *arguments)
    made = {v: equation for equation in equations for v in equation.outvars}
    found = [x for x in equations if x.primitive.name == "dot_general" and "tensor_products.py" in source_of(x)]

    def rounded(atom: Any) -> bool:
        """Whether a value is only moved, converted, selected, or made finite by its bits, since it was rounded."""
        if isinstance(atom, Literal):
            return True
        if (origin := made.get(atom)) is None:
            return False
        name = origin.primitive.name
        if name == "convert_element_type" and origin.params["new_dtype"] == jnp.bfloat16:
            return rounded(origin.invars[0])
        if name == "jit":  # not inlined: integers, as which it was made finite, have no derivative
            return origin.params["name"] == "_take" and rounded(origin.invars[0])
        if name == "custom_vjp_call":  # where an operand that depends on no parameter was rounded: it has no derivative
            inner = origin.params["call_jaxpr"].jaxpr
            made.update((v, equation) for equation in inner.eqns for v in equation.outvars)
            return rounded(inner.outvars[origin.outvars.index(atom)])
        if name in ("select_n", "and", "min", "or"):
            return all(map(rounded, origin.invars[1 if name == "select_n" else 0 :]))
        if name == "optimization_barrier":
            return rounded(origin.invars[origin.outvars.index(atom)])
        return name == "reduce_precision" or (name in MOVES and rounded(origin.invars[0]))

    for equation in found:
        assert all(map(rounded, equation.invars)), equation
    return found
