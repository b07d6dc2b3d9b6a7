"""Losses of one example in which it sees the others: each moved a clipped sum by many C; all are refused by name.

`custom_vmap`, batching callbacks and collectives hand a loss the whole batch behind its back. Here every example's
loss is multiplied by what the others hold, so that one record turns all gradients over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, PartitionSpec

from dpdist.mechanism.clipping import METHODS, UnsupportedLossError, clipped_grad_sum

Loss = Callable[[Any, Any], Any]
PARAMS = {"w": np.full((4, 3), 0.5, np.float32)}
BATCH = {"x": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) + 3}
AXIS = "devices"


@jax.custom_batching.custom_vmap
def against_the_batch(x: Any) -> Any:
    """The identity, for one example; of a batch, its sign is that of the last example's first entry."""
    return x


@against_the_batch.def_vmap
def _(size: int, batched: Any, x: Any) -> Any:
    return x * jnp.sign(x.reshape(size, -1)[-1, 0]), True


def custom(x: Any) -> Any:
    return against_the_batch(x)  # LINE: custom_vmap_call


@jax.custom_vjp
def in_bwd(x: Any) -> Any:
    return x


in_bwd.defvjp(lambda x: (x, x), lambda x, g: (g * custom(x),))


@jax.custom_vjp
def in_fwd(x: Any) -> Any:
    return x


in_fwd.defvjp(lambda x: (custom(x), None), lambda _, g: (g,))


@jax.custom_jvp
def in_jvp(x: Any) -> Any:
    return x


in_jvp.defjvp(lambda x, dx: (x[0], dx[0] * custom(x[0])))


def host(x: Any, method: str | None) -> Any:
    turn = lambda x: np.asarray(x) * np.sign(np.ravel(x)[-4])  # noqa: E731
    return jax.pure_callback(turn, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method=method)  # LINE: pure_callback


@jax.custom_vjp
def host_in_bwd(x: Any) -> Any:
    return x


host_in_bwd.defvjp(lambda x: (x, x), lambda x, g: (g * host(x, "sequential"),))


def effect(x: Any) -> Any:
    return io_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # LINE: io_callback


def foreign(x: Any, method: str = "broadcast_all") -> Any:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("anything", shape, vmap_method=method)(x)  # LINE: ffi_call


def kernel(x: Any) -> Any:
    def copy(source: Any, target: Any) -> None:
        target[...] = source[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(copy, out_shape=shape, interpret=True)(x)  # LINE: pallas_call


mine = Primitive("sin")
mine.def_impl(lambda x: x * jnp.sign(x.ravel()[-4]))
mine.def_abstract_eval(lambda x: x)
batching.defvectorized(mine)
mlir.register_lowering(mine, mlir.lower_fun(mine.impl, multiple_results=False))


def own(x: Any) -> Any:
    return mine.bind(x)  # LINE: sin


def first_key(x: Any) -> Any:
    """Under vmap, the bits of every example come from the first example's key."""
    key = jax.random.wrap_key_data(lax.bitcast_convert_type(x, jnp.uint32), impl="rbg")  # LINE: random_wrap
    return x * jax.random.rademacher(key, (), jnp.float32)


def inner_mesh(x: Any) -> Any:
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("inner",))
    everywhere = PartitionSpec()
    return jax.shard_map(lambda x: x, mesh=mesh, in_specs=everywhere, out_specs=everywhere)(x)  # LINE: shard_map


def reference(x: Any) -> Any:
    count = jax.new_ref(x)  # LINE: new_ref
    return count[...]


def uninitialised(x: Any) -> Any:
    return x + lax.empty(x.shape, x.dtype)  # LINE: empty


def looped(x: Any) -> Any:
    return lax.while_loop(lambda h: jnp.sum(h) < 0, custom, x)


def solved(x: Any) -> Any:
    return lax.custom_linear_solve(lambda v: 2 * v, x, lambda _, b: custom(b) / 2, symmetric=True)


def of_data(mix: Callable[[Any], Any]) -> Loss:
    return lambda p, e: jnp.sum(jnp.tanh(mix(e["x"]) @ p["w"]))


def of_hidden(mix: Callable[[Any], Any]) -> Loss:
    return lambda p, e: jnp.sum(mix(e["x"] @ p["w"]) ** 2)  # LINE: rule


def of_parameters(mix: Callable[[Any], Any]) -> Loss:
    """The rule runs on the gradient of every example, behind the bookkeeping of uses."""
    return lambda p, e: jnp.sum(jnp.tanh(e["x"] @ mix(p["w"])))  # LINE: rule of parameters


ATTACKS: dict[str, tuple[Loss, str]] = {
    "custom_vmap": (of_data(custom), "custom_vmap_call"),
    "under jit": (jax.jit(of_data(jax.jit(custom))), "custom_vmap_call"),
    "in a scan": (of_data(lambda x: lax.scan(lambda h, _: (custom(h), None), x, None, 2)[0]), "custom_vmap_call"),
    "in a long scan": (of_data(lambda x: lax.fori_loop(0, 99, lambda _, h: custom(h), x)), "custom_vmap_call"),
    "in a branch": (of_data(lambda x: lax.cond(x[0] > 9, jnp.sin, custom, x)), "custom_vmap_call"),
    "in a while loop": (of_data(looped), "custom_vmap_call"),
    "in a linear solve": (of_data(solved), "custom_vmap_call"),
    "rematerialised": (of_data(jax.checkpoint(custom)), "custom_vmap_call"),
    "in a bwd": (of_hidden(in_bwd), "custom_vmap_call"),
    "in a fwd": (of_hidden(in_fwd), "custom_vmap_call"),
    "in a jvp": (of_hidden(in_jvp), "custom_vmap_call"),
    "in a bwd of parameters": (of_parameters(in_bwd), "custom_vmap_call"),
    "callback, expanded": (of_data(partial(host, method="expand_dims")), "pure_callback"),
    "callback, no method": (of_data(partial(host, method=None)), "pure_callback"),
    "callback, broadcast": (of_data(partial(host, method="broadcast_all")), "pure_callback"),
    "callback, one by one": (of_data(partial(host, method="sequential")), "pure_callback"),
    "callback, unrolled": (of_data(partial(host, method="sequential_unrolled")), "pure_callback"),
    "callback in a bwd": (of_hidden(host_in_bwd), "pure_callback"),
    "callback with effects": (of_data(effect), "io_callback"),
    "foreign function": (of_data(foreign), "ffi_call"),
    "foreign function, one by one": (of_data(partial(foreign, method="sequential")), "ffi_call"),
    "kernel": (of_data(kernel), "pallas_call"),
    "the user's own": (of_data(own), "sin"),
    "rbg keys": (of_data(first_key), "random_wrap"),
    "inner mesh": (of_data(inner_mesh), "shard_map"),
    "uninitialised memory": (of_data(uninitialised), "empty"),
    "reference": (of_data(reference), "new_ref"),
}  # fmt: skip


def line_of(primitive: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# LINE: {primitive}"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_operation_that_could_mix_examples_is_refused_with_its_line(name: str, method: str) -> None:
    loss_fn, primitive = ATTACKS[name]
    with pytest.raises(UnsupportedLossError) as caught:
        jax.jit(clipped_grad_sum(loss_fn, clip_norm=1.0, method=method))(PARAMS, BATCH, np.ones(64, np.float32))
    # JAX gives what a derivative rule computes the line of the equation that it belongs to.
    rule = dict.fromkeys(("in a bwd", "in a jvp", "in a fwd", "callback in a bwd"), "rule")
    rule["in a bwd of parameters"] = "rule of parameters"
    lines = {line_of(primitive), line_of(rule.get(name, primitive))}
    assert str(caught.value).startswith(tuple(f"{primitive} at {__file__}:{line}:" for line in lines)), caught.value
    assert "let one example see another" in str(caught.value)


def summed(x: Any) -> Any:
    return x * jnp.sign(lax.psum(x, AXIS)[0])  # LINE: psum


def gathered(x: Any) -> Any:
    return x * jnp.sign(lax.all_gather(x, AXIS)[-1, 0])  # LINE: all_gather


def numbered(x: Any) -> Any:
    return x * (lax.axis_index(AXIS) + 1)  # LINE: axis_index


COLLECTIVES = {"psum": summed, "all_gather": gathered, "axis_index": numbered}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("bound", ["mesh", "vmap", "not at all"])
def test_a_collective_is_refused_with_its_line_wherever_its_axis_is_bound(name: str, method: str, bound: str) -> None:
    clipped = clipped_grad_sum(of_data(COLLECTIVES[name]), clip_norm=1.0, method=method)
    function: Callable[..., Any] = clipped
    batch, mask = BATCH, np.ones(64, np.float32)
    if bound == "mesh":
        split = PartitionSpec(AXIS)
        mesh = Mesh(np.array(jax.devices("cpu")[:4]), (AXIS,))
        function = jax.shard_map(
            lambda *a: jax.tree.map(lambda s: s[None], clipped(*a)[0]),
            mesh=mesh, check_vma=False, in_specs=(PartitionSpec(), split, split), out_specs=split,
        )  # fmt: skip
    elif bound == "vmap":
        function = jax.vmap(clipped, (None, 0, 0), axis_name=AXIS)
        batch, mask = {"x": BATCH["x"].reshape(4, 16, 4)}, mask.reshape(4, 16)
    with pytest.raises(UnsupportedLossError) as caught:
        jax.jit(function)(PARAMS, batch, mask)
    assert f" at {__file__}:{line_of(name)}" in str(caught.value), caught.value
    assert name in str(caught.value).partition(" at ")[0]


def alone(x: Any) -> Any:
    """All that a loss may well do: draw, look, loop, branch."""
    jax.debug.print("{x}", x=x[0])
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), lax.bitcast_convert_type(x[0], jnp.uint32))
    x = x + jax.random.normal(key, x.shape) * jax.random.bernoulli(key, 0.5, x.shape)
    x = lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h / 2, x)
    x = jnp.sort(lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)) + jax.vmap(jnp.tanh)(x)
    return x * jnp.sign(x)


@pytest.mark.parametrize("method", METHODS)
def test_what_keeps_examples_apart_is_not_refused(method: str) -> None:
    """And it gives every example what it gives it alone."""
    clipped = jax.jit(clipped_grad_sum(of_data(alone), clip_norm=0.5, method=method))
    whole = clipped(PARAMS, {"x": BATCH["x"][:5]}, np.ones(5, np.float32))[0]["w"]
    parts = [clipped(PARAMS, {"x": BATCH["x"][i : i + 1]}, np.ones(1, np.float32))[0]["w"] for i in range(5)]
    assert np.abs(np.asarray(whole) - sum(map(np.asarray, parts))).max() < 1e-5


def test_a_callback_that_remembers_the_examples_before_is_refused() -> None:
    """It subtracts the mean of those, one at a time: one record more moved the sum of 64 by over 60 C."""
    seen: list[Any] = []

    def centred(x: Any) -> Any:
        seen.append(np.asarray(x))
        return np.sign(np.mean(seen)) * np.asarray(x)

    def loss(p: Any, e: Any) -> Any:
        ends = jax.ShapeDtypeStruct(e["x"].shape, e["x"].dtype)
        return jnp.sum(jax.pure_callback(centred, ends, e["x"], vmap_method="sequential") @ p["w"])

    with pytest.raises(UnsupportedLossError, match=r"pure_callback at .* could let one example see another"):
        jax.jit(clipped_grad_sum(loss, clip_norm=1.0))(PARAMS, BATCH, np.ones(64, np.float32))
    assert not seen
