"""Flatten the jaxpr of a loss: inline the calls that parameters go into, and unroll short scans.

A parameter that is multiplied with data inside a call or a loop is so at the top level afterwards, where its use can be
seen. The result is an ordinary jaxpr, of the same values: we run the old one, call by call, under `jax.make_jaxpr`. An
equation with its own derivative rule (`custom_jvp`, `custom_vjp`) or with branches (`cond`, `while`) stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.source_info_util import user_context

#: Primitives that only call another jaxpr, and the equation parameter that holds it.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
#: Primitives that no gradient passes through: their derivative is zero wherever it exists.
FLAT = frozenset({"stop_gradient", "sign", "floor", "ceil", "round"})
#: The longest scan that is unrolled; a longer one stays one equation, and its parameters' gradients are instantiated.
LONGEST_UNROLLED = 48


class Origin(NamedTuple):
    """What a value is computed from."""

    #: True if it is data-derived, so different for every example.
    data: bool = False
    #: Numbers of the parameter leaves that a gradient at it flows to; empty for data-derived values.
    leaves: frozenset[int] = frozenset()


def origins(equation: JaxprEqn, inputs: Sequence[Origin]) -> list[Origin]:
    """Return the origins of an equation's outputs, given those of its inputs."""
    if any(each.data for each in inputs):
        return [Origin(data=True)] * len(equation.outvars)
    leaves = frozenset().union(*(each.leaves for each in inputs if equation.primitive.name not in FLAT))
    return [Origin(leaves=leaves) if differentiable(v) else Origin() for v in equation.outvars]


def differentiable(atom: Any) -> bool:
    """Return whether a variable's dtype is floating-point or complex."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def shape_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a variable or literal."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def flatten(closed: ClosedJaxpr, of_inputs: Sequence[Origin]) -> ClosedJaxpr:
    """Return a jaxpr that computes the same, with no parameter behind a call or a short scan that mixes it with data.

    Args:
        closed: the loss of one example.
        of_inputs: the origin of each input.
    """

    def run(*inputs: Any) -> list[Any]:
        return [value for value, _ in _run(closed.jaxpr, closed.consts, list(zip(inputs, of_inputs, strict=True)))]

    return jax.make_jaxpr(run)(*map(shape_of, closed.jaxpr.invars))


#: A traced value and its origin.
_Traced = tuple[Any, Origin]


def _run(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[_Traced]) -> list[_Traced]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: (constant, Origin()) for v, constant in zip(jaxpr.constvars, constants, strict=True)}

    def read(atom: Any) -> _Traced:
        return (atom.val, Origin()) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        known |= zip(equation.outvars, _equation(equation, [read(atom) for atom in equation.invars]), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: JaxprEqn, inputs: list[_Traced]) -> list[_Traced]:
    name, params = equation.primitive.name, equation.params
    if any(origin.leaves for _, origin in inputs):
        if name in CALLS:
            return _run(*inner(params[CALLS[name]]), inputs)
        if name == "scan" and any(origin.data for _, origin in inputs) and 0 < params["length"] <= LONGEST_UNROLLED:
            return _unroll(equation, inputs)
    values = call(equation, [value for value, _ in inputs])
    return list(zip(values, origins(equation, [origin for _, origin in inputs]), strict=True))


def _unroll(equation: JaxprEqn, inputs: list[_Traced]) -> list[_Traced]:
    """Run a scan step by step, so that each step's slice of a stacked parameter is a view of it."""
    steps = range(equation.params["length"])
    jaxpr, constants = inner(equation.params["jaxpr"])
    # A carry has the same shape inside and outside the scan; a scanned input has one axis less inside. We count
    # them by that because JAX releases store the counts differently.
    scanned = sum(shape_of(v).ndim > shape_of(w).ndim for v, w in zip(equation.invars, jaxpr.invars, strict=True))
    carried = sum(shape_of(v).ndim == shape_of(w).ndim for v, w in zip(equation.outvars, jaxpr.outvars, strict=True))
    stacked = inputs[len(inputs) - scanned :]
    fixed = inputs[: len(inputs) - scanned - carried]
    carry = inputs[len(fixed) : len(fixed) + carried]
    rows: dict[int, list[_Traced]] = {}
    with user_context(equation.source_info.traceback):
        for step in reversed(steps) if equation.params["reverse"] else steps:
            # Written with operations that a `View` can follow.
            slices = [(lax.index_in_dim(value, step, keepdims=False), origin) for value, origin in stacked]
            results = _run(jaxpr, constants, [*fixed, *carry, *slices])
            carry, rows[step] = results[:carried], results[carried:]
        outputs = list(zip(*(rows[step] for step in steps), strict=True))
        return [*carry, *(_stacked(output) for output in outputs)]


def _stacked(parts: Sequence[_Traced]) -> _Traced:
    data, leaves = any(o.data for _, o in parts), frozenset().union(*(o.leaves for _, o in parts))
    value = lax.concatenate([lax.expand_dims(value, (0,)) for value, _ in parts], 0)
    return value, Origin(data=True) if data else Origin(leaves=leaves)


def inner(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the jaxpr that an equation holds and its constants; it may be a Jaxpr or a ClosedJaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def call(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Run one equation; JAX's errors name the line of the user's code that it comes from."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # depends on the JAX release
    with user_context(equation.source_info.traceback), equation.ctx.manager:
        results = equation.primitive.bind(*functions, *inputs, **params)
    return list(results) if equation.primitive.multiple_results else [results]
