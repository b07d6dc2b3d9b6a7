"""Compute something for every example of a batch, and refuse what could let one example see another.

That the loss takes one example is not enough. A sum of clipped gradients has sensitivity C only if every gradient
depends on its own example alone, and `vmap` runs some operations for all examples at once by a rule that is not JAX's:

* `custom_vmap` hands the whole batch to the user's code; so may callbacks and foreign functions, and run one example at
  a time they may still remember the last one, which nothing here can see;
* collectives (`psum`, `axis_index`, ...) read what other examples, devices or the position in the batch hold, if an
  axis of that name is bound where the loss is traced;
* kernels (Pallas), references, and effects on the host reach memory that outlives one example;
* a convolution whose batch is split into groups, as the gradient of a grouped convolution's kernel is: XLA computes it
  for all pairs of examples and masks by multiplication, so that one example's NaN takes all the others out;
* keys of `rbg` generators: under `vmap`, every example's draws come from the first example's key.

So this fails closed. We trace the function of one example and run exactly what was checked: the jaxpr, with every
derivative rule resolved in it. Each equation of it, at any depth, must be one of JAX's own operations, whose batching
JAX itself defines to be that of a loop over the examples: an object of one of the modules below, not merely its name.
A primitive that a user or another library defines, or that a later JAX puts elsewhere, is refused until it is added.

Trusted are JAX's own rules and constants: what the loss closes over is the same for all examples. Callbacks for
debugging return nothing, so they change no sum.
Code that replaces rules inside JAX, or code of ours, can't be held off from here.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import source_info_util  # JAX has no public name for an equation's source line
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, jaxpr_as_fun

#: Modules of `jax._src` whose operations are batched as a loop over the examples would run them.
_MODULES = (
    "ad_checkpoint ad_util custom_derivatives debugging dispatch pjit lax.ann lax.control_flow.conditionals "
    "lax.control_flow.loops lax.control_flow.solves lax.convolution lax.fft lax.lax lax.linalg lax.slicing lax.special "
    "lax.windowed_reductions random.core random.prng random.threefry2x32"
)
#: Operations found there that are not: uninitialised memory, streams of random bits, rules and code of any origin.
_NOT_ALONE = frozenset({"call_hi_primitive", "composite", "empty", "rng_bit_generator", "rng_uniform"})


class UnsupportedLossError(ValueError):
    """This loss has no per-example gradients; the message names the equation, the parameters and the source line."""


def for_each(function: Callable[..., Any], examples: int, *batched: Any) -> Any:
    """Return `function` of every example, stacked: as `jax.vmap(function)(*batched)`.

    Args:
        function: a function of the leaves of one example; what it closes over is the same for all.
        examples: p.
        batched: pytrees whose leaves have leading axis p.

    Raises:
        UnsupportedLossError: in it, one example could see another.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batched)
    with naming_axes():
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*one)
    require_separate(closed.jaxpr)
    found = jax.vmap(jaxpr_as_fun(closed), axis_size=examples)(*jax.tree.leaves(batched))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def require_separate(jaxpr: Jaxpr) -> None:
    """Check a jaxpr of one example, and all that it calls.

    Raises:
        UnsupportedLossError: an operation could let one example see another; the message names it and its line.
    """
    pending, seen = [jaxpr], set()
    while pending:
        if id(current := pending.pop()) in seen:
            continue
        seen.add(id(current))
        for equation in current.eqns:
            if remedy := _remedy(equation):
                raise UnsupportedLossError(_message(f"{equation.primitive.name} at {source_of(equation)}", remedy))
            pending += _held(list(equation.params.values()))


def _remedy(equation: JaxprEqn) -> str:
    """What to use instead of an equation that could let one example see another; empty for any other."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and params["batch_group_count"] > 1:
        return "training.clipping=auto and a kernel that is a parameter itself, or one convolution a group"
    for atom in (*equation.invars, *equation.outvars):
        dtype = getattr(atom.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and str(dtype) != "key<fry>":
            return "a key of JAX's implementation threefry2x32"
    if name == "call_hi_primitive":  # how JAX 0.12 writes jnp.searchsorted and a few others
        own = type(params["_prim"]).__module__ in ("jax._src.numpy.hijax", "jax._src.numpy.ufuncs")
    else:
        own = id(equation.primitive) in _rowwise()
    return "" if own else "operations of jax.numpy and jax.lax on one example"


@cache
def _rowwise() -> frozenset[int]:
    """The identities of JAX's own operations that keep examples apart."""
    from jax._src.core import call_p, closed_call_p  # beside references, in a module of many things

    found = [call_p, closed_call_p]
    for module in _MODULES.split():
        found += vars(sys.modules.get(f"jax._src.{module}", object)).values()
    return frozenset(id(each) for each in found if isinstance(each, Primitive) and each.name not in _NOT_ALONE)


def _held(values: list[Any]) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _held(list(value))
        elif isinstance(inner := getattr(value, "jaxpr", value), Jaxpr):
            yield inner


@contextmanager
def naming_axes() -> Iterator[None]:
    """Wrap the tracing of a loss, to name a collective over an axis that is not bound there.

    Raises:
        UnsupportedLossError: instead of JAX's error.
    """
    try:
        yield
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(f for f in reversed(frames) if source_info_util.is_user_filename(f.filename))
        where = f"{frame.line or frame.name} at {frame.filename}:{frame.lineno} ({error})"
        raise UnsupportedLossError(_message(where, "operations of jax.numpy and jax.lax on one example")) from error


def _message(what: str, remedy: str) -> str:
    return f"{what} could let one example see another, so C would not bound what one adds: use {remedy}"


def source_of(equation: JaxprEqn) -> str:
    """File and line of the user's code that an equation comes from."""
    return source_info_util.summarize(equation.source_info)
