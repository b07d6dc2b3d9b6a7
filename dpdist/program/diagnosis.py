"""Explain why a loss has no per-example gradients: which equation, at which source line, behind which parameters.

JAX names at best the primitive that failed, not which of the loss's many equations it was. We find the equation by
differentiating ever shorter tails of the loss. This runs only after a failure, so no gradient sum depends on it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from dpdist.mechanism.clipping.bookkeeping import REFUSALS
from dpdist.mechanism.clipping.flatten import CALLS, FLAT, differentiable, inner, shape_of
from dpdist.mechanism.clipping.graph import Graph, read, run, trace
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.mechanism.clipping.separate import UnsupportedLossError, source_of

_REMEDY = "jax.custom_vjp to give it the rule that is missing"
_REMEDIES = {
    "while": "lax.scan, or lax.fori_loop with a trip count known when it is traced",
    "pure_callback": "operations of jax.numpy and jax.lax, since a callback could remember other examples",
}
#: Primitives whose derivative is that of the jaxprs they hold, and the equation parameter that holds one or several.
_BODIES = {**CALLS, "cond": "branches", "scan": "jaxpr"}
_SHOWN = 8  # parameter paths listed in a message


@contextmanager
def naming_the_fault(
    loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any, frozen: Collection[str]
) -> Iterator[None]:
    """Wrap a gradient sum of `loss_fn` over a `batch`, or the tracing of one, to name the equation that fails.

    Raises:
        UnsupportedLossError: instead of JAX's error, if the equation at fault is found.
    """
    try:
        yield
    except UnsupportedLossError:
        raise
    except REFUSALS as error:
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        if (named := unsupported(trace(loss_fn, params, example, frozen), params)) is not None:
            raise named from error
        raise


def unsupported(graph: Graph, params: Any) -> UnsupportedLossError | None:
    """Return an error that names the equation JAX cannot differentiate or batch; None if there is no such equation."""
    inputs = [graph.origins[v].leaves for v in graph.params] + [frozenset()] * len(graph.example)
    batched = [False] * len(graph.params) + [True] * len(graph.example)
    found = _fault(graph.closed.jaxpr, graph.closed.consts, inputs, batched)
    return None if found is None else UnsupportedLossError(_message(*found, paths_of(params)))


def _message(equation: JaxprEqn, leaves: Collection[int], refusal: Exception, paths: Sequence[str]) -> str:
    names = ", ".join(paths[n] for n in sorted(leaves)[:_SHOWN])
    more = f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else ""
    where = (
        f"which the gradient of {names}{more} goes through" if leaves else "which no parameter that trains goes into"
    )
    stop = ", or lax.stop_gradient on what goes in where no gradient is meant" if leaves else ""
    name = equation.primitive.name
    return (
        f"{name} at {source_of(equation)}, {where}, has no per-example derivative: "
        f"use {_REMEDIES.get(name, _REMEDY)}{stop} (JAX: {str(refusal).removesuffix('.')})"
    )


#: Numbers of the leaves that a gradient at a value flows to.
_Leaves = frozenset[int]


def _fault(
    jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[_Leaves], batched: Sequence[bool]
) -> tuple[JaxprEqn, _Leaves, Exception] | None:
    """Find the last equation whose derivative is needed but does not exist; None if all exist.

    Args:
        inputs: the leaves behind each input of the jaxpr.
        batched: whether each input is different for every example.

    Returns:
        The equation, the leaves whose gradient goes through it, and JAX's error.
    """
    reaching: dict[Var, _Leaves] = dict.fromkeys(jaxpr.constvars, frozenset()) | dict(
        zip(jaxpr.invars, inputs, strict=True)
    )
    axes = dict.fromkeys(jaxpr.constvars, False) | dict(zip(jaxpr.invars, batched, strict=True))
    for equation in jaxpr.eqns:
        leaves = _behind(equation, reaching) if equation.primitive.name not in FLAT else frozenset()
        reaching |= {v: leaves if differentiable(v) else frozenset() for v in equation.outvars}
        each = any(axes[v] for v in equation.invars if not isinstance(v, Literal))
        axes |= dict.fromkeys(equation.outvars, each)

    def refusal(start: int) -> Exception | None:
        return _refusal(jaxpr, constants, start, reaching, axes)

    if refusal(0) is None:
        return None
    # A shorter tail needs fewer derivatives, so the one at fault comes just before the longest tail that has them all.
    number = bisect_left(range(1, len(jaxpr.eqns) + 1), True, key=lambda start: refusal(start) is None)
    equation, error = jaxpr.eqns[number], refusal(number)
    if error is None:
        return None
    leaves = _behind(equation, reaching)
    for body, own in _bodies(equation):
        mine = equation.invars[len(equation.invars) - len(body.invars) :]  # without the branch index of a `cond`
        # A scan step's carry goes into the next step, so every input may depend on every parameter behind the scan.
        into = [leaves if equation.primitive.name == "scan" else _behind_one(atom, reaching) for atom in mine]
        inside = [behind if differentiable(v) else frozenset() for v, behind in zip(body.invars, into, strict=True)]
        if (found := _fault(body, own, inside, [True] * len(inside))) is not None:
            return found
    return equation, leaves, error


def _bodies(equation: JaxprEqn) -> Iterator[tuple[Jaxpr, Sequence[Any]]]:
    """Yield the jaxprs that an equation runs, and their constants.

    Yields nothing for one with its own derivative rule, nor for a while loop, which cannot be differentiated at all.
    """
    held = equation.params[_BODIES[equation.primitive.name]] if equation.primitive.name in _BODIES else ()
    for each in held if isinstance(held, tuple) else (held,):
        yield inner(each)


def _behind(equation: JaxprEqn, reaching: Mapping[Var, _Leaves]) -> _Leaves:
    return frozenset().union(*(_behind_one(atom, reaching) for atom in equation.invars))


def _behind_one(atom: Any, reaching: Mapping[Var, _Leaves]) -> _Leaves:
    return frozenset() if isinstance(atom, Literal) else reaching[atom]


def _refusal(
    jaxpr: Jaxpr,
    constants: Sequence[Any],
    start: int,
    reaching: Mapping[Var, _Leaves],
    axes: Mapping[Var, bool],
) -> Exception | None:
    """Return JAX's error when it differentiates the equations from `start` on by all their inputs; None if it can."""
    tail = jaxpr.eqns[start:]
    fixed = dict(zip(jaxpr.constvars, constants, strict=True))
    before = [*jaxpr.invars, *(v for equation in jaxpr.eqns[:start] for v in equation.outvars)]
    by = [v for v in before if reaching[v]]

    def gradients(known: list[Any]) -> Any:
        def results(moved: list[Any]) -> list[Any]:
            values = fixed | dict(zip(before, known, strict=True)) | dict(zip(by, moved, strict=True))
            for equation in tail:
                run(equation, values)
            return read((v for v in jaxpr.outvars if isinstance(v, Literal) or differentiable(v)), values)

        found, back = jax.vjp(results, [value for v, value in zip(before, known, strict=True) if reaching[v]])
        return back([jnp.ones_like(value) for value in found])

    each = [(shape_of(v), axes[v]) for v in before]
    two = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) if batched else x for x, batched in each]
    try:  # a batch of two examples is enough
        jax.eval_shape(jax.vmap(gradients, in_axes=([0 if batched else None for _, batched in each],)), two)
    except REFUSALS as error:
        return error
    return None
