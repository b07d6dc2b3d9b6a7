"""Norm and sum read the same rounded numbers, also where XLA drops a pair of casts, as it does on GPUs.

There `float32 -> bfloat16 -> float32` is no rounding. `evaluate` runs a traced function that way: whatever is cast to a
shorter format and back to float32 keeps all its digits, and only a cast to float64 sees the rounded ones. Nor does XLA
promise an order of summation: `evaluate` sums one number after the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Literal

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.clipping.weights import rounded_float32

#: Operations that only move numbers, through which XLA sees the pair all the same.
MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "copy", "slice", "select_n", "concatenate"}
SHORT = (jnp.bfloat16, jnp.float16)


def evaluate(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """The outputs of a traced function under such a compiler."""
    return [value for value, _ in _evaluate(closed, [(argument, None) for argument in arguments])]


def _evaluate(closed: ClosedJaxpr, arguments: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Values, each with what it was before it was rounded, or None."""
    known = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    known |= {var: (value, None) for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)}

    def read(atom: Any) -> tuple[Any, Any]:
        return (atom.val, None) if isinstance(atom, Literal) else known[atom]

    for eqn in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            results = _evaluate(eqn.params["jaxpr"], inputs)
        else:
            results = _bind(eqn, inputs)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _bind(eqn: Any, inputs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # depends on the JAX release

    def call(*operands: Any) -> list[Any]:
        with eqn.ctx.manager:
            found = eqn.primitive.bind(*functions, *operands, **params)
        return list(found) if eqn.primitive.multiple_results else [found]

    if eqn.primitive.name == "reduce_sum":
        return [(one_after_the_other(inputs[0][0], eqn.params["axes"]), None)]
    values = call(*(value for value, _ in inputs))
    before: list[Any] = [None] * len(values)
    if eqn.primitive.name == "convert_element_type":
        ((value, unrounded),) = inputs
        if values[0].dtype in SHORT and value.dtype == np.float32:
            before = [value]
        elif values[0].dtype == np.float32 and unrounded is not None:
            values = [unrounded]
    elif eqn.primitive.name in MOVES and any(unrounded is not None for _, unrounded in inputs):
        before = call(*(_wide(value) if unrounded is None else unrounded for value, unrounded in inputs))
    return list(zip(values, before, strict=True))


def one_after_the_other(value: Any, axes: tuple[int, ...]) -> Any:
    """A sum in the number format of what is summed up."""
    moved = np.moveaxis(np.asarray(value), axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    with jax.enable_x64(True):
        return jnp.asarray(np.cumsum(flat, axis=-1, dtype=flat.dtype)[..., -1] if flat.shape[-1] else flat.sum(-1))


def _wide(value: Any) -> Any:
    return value.astype(np.float32) if getattr(value, "dtype", None) in SHORT else value


def loss(params: Any, example: Any) -> Any:
    """Two layers in bfloat16 of float32 parameters; at both, the factors are rounded from float32."""
    w, v = (params[name].astype(jnp.bfloat16) for name in ("w", "v"))
    h = example["x"].astype(jnp.bfloat16) @ w
    return jnp.sum((h.astype(jnp.float32) * example["y"]).astype(jnp.bfloat16) @ v).astype(jnp.float32)


def problem() -> tuple[Any, Any]:
    """Factors that are all rounded down, by almost half a unit in the last place: 0.19% each."""
    down = 1 + 2.0**-8 * 0.49
    params = {"w": np.full((5, 3), 0.25, np.float32), "v": np.full((3, 2), 0.5, np.float32)}
    return params, {"x": np.full((2, 4, 5), down, np.float32), "y": np.full((2, 4, 3), down, np.float32)}


@pytest.mark.parametrize("how", ["ghost", "instantiate", "two passes", "per_example"])
@pytest.mark.parametrize("example", [0, 1])
def test_an_example_adds_at_most_the_clip_norm_where_xla_drops_casts(how: str, example: int) -> None:
    params, batch = problem()
    options: dict[str, Any] = {"strategies": dict.fromkeys("wv", how)}
    if how in ("two passes", "per_example"):
        options = {"method": "ghost" if how == "two passes" else how}
    clip_norm = 0.1
    clipped = clipped_grad_sum(loss, clip_norm=clip_norm, **options)
    mask = np.eye(2, dtype=np.float32)[example]
    traced = jax.make_jaxpr(clipped)(params, batch, mask)
    sums = evaluate(traced, *jax.tree.leaves((params, batch, mask)))[:2]
    contribution = np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in sums))
    assert 0.99 * clip_norm < contribution <= clip_norm


def test_the_evaluation_drops_pairs_of_casts_and_nothing_else() -> None:
    def f(x: Any) -> Any:
        short = x.astype(jnp.bfloat16)
        return short.reshape(2, 1).astype(jnp.float32), short, jax.lax.reduce_precision(x, 8, 7)

    x = np.array([1.0009765625, 3.0], np.float32)
    kept, short, reduced = evaluate(jax.make_jaxpr(f)(x), x)
    assert np.asarray(kept).ravel().tolist() == x.tolist()
    assert np.asarray(short, np.float32).tolist() == np.asarray(reduced).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("dtype", SHORT)
def test_a_number_of_a_short_format_keeps_its_value(dtype: Any) -> None:
    """The smallest ones too, which `reduce_precision` to float16's own exponents would flush to 0."""
    x = jnp.asarray([3e-5, 6e-8, -1.5, 0.1, 65504.0], dtype)
    assert rounded_float32(x).tolist() == x.astype(jnp.float32).tolist()


@pytest.mark.parametrize(("dtype", "passes"), [(jnp.float32, 2), (jnp.bfloat16, 1)])
def test_the_sum_is_that_of_the_pass_whose_norms_were_taken_in_short_formats(dtype: Any, passes: int) -> None:
    """Two passes that are compiled differently may round a value of a short format to different neighbours."""

    def plain(params: Any, example: Any) -> Any:
        return jnp.sum(jnp.sin(example["x"].astype(dtype) @ params["w"].astype(dtype)).astype(jnp.float32))

    params, batch = problem()
    mask = np.ones(2, np.float32)
    traced = jax.make_jaxpr(clipped_grad_sum(plain, clip_norm=0.1, method="ghost"))(params, batch, mask)
    assert str(traced).count(" sin ") == passes


def small_beside_large(entries: int) -> np.ndarray:
    """One 1 and then numbers whose squares are each lost beside its own in float32, but which together are 3%."""
    values = np.full(entries, 2.0**-12.51, np.float32)
    values[0] = 1
    return values


@pytest.mark.parametrize("how", ["per_example", "instantiate", "ghost"])
def test_an_example_adds_at_most_the_clip_norm_however_long_a_leaf_is_and_in_whatever_order_xla_sums(how: str) -> None:
    """Summed in float32, the norm was 1.5% too small; XLA's own order is better, and no bound."""
    x = small_beside_large(2**20)

    def outer(params: Any, example: Any) -> Any:
        return example["x"] @ params["w"] @ example["y"]  # gradient x y^T: for `ghost`, its norm is that of the factors

    params, batch = {"w": np.zeros((len(x), 1), np.float32)}, {"x": x[None], "y": np.ones((1, 1), np.float32)}
    options: dict[str, Any] = {"method": "per_example"} if how == "per_example" else {"strategies": {"w": how}}
    clip_norm, mask = 0.1, np.ones(1, np.float32)
    traced = jax.make_jaxpr(clipped_grad_sum(outer, clip_norm=clip_norm, **options))(params, batch, mask)
    sums, norms = evaluate(traced, *jax.tree.leaves((params, batch, mask)))
    assert 0.999 * clip_norm < np.linalg.norm(np.asarray(sums, np.float64)) <= clip_norm
    assert abs(float(norms[0]) / np.linalg.norm(x.astype(np.float64)) - 1) < 2.0**-22


def test_the_margin_of_a_norm_is_what_float32_can_lose_and_hardly_more() -> None:
    """Gradients of every size of mantissa: none adds more than C, none is shrunk by more than twice the bound."""
    clip_norm, random = 0.7, np.random.default_rng(3)
    clipped = jax.jit(clipped_grad_sum(lambda p, e: jnp.sum(p * e["x"]), clip_norm=clip_norm, method="per_example"))
    for _ in range(300):
        x = (random.normal(size=(1, 3)) * random.uniform(1, 4)).astype(np.float32)
        x *= np.float32(clip_norm * random.uniform(1, 2) / np.linalg.norm(x))
        added = np.linalg.norm(np.asarray(clipped(np.zeros(3, np.float32), {"x": x}, np.ones(1, np.float32))[0], float))
        assert added <= clip_norm
        if np.linalg.norm(x.astype(float)) > clip_norm:
            assert added > clip_norm * (1 - 2.0**-18)
