"""Rewrite a function so that its matrix products contract one axis each, which XLA computes without copies on a CPU.

Under `vmap`, the gradient of a weight over examples and tokens contracts two axes, [p, t, m] with [p, t, n]. XLA for
CPUs then transposes both operands, and recomputes what they are made of in the order of the transpose: 40% of the time
of plain SGD of ViT-Ti, and most of its compile time. As [p t, m] and [p t, n], the same numbers in the same order, it
is an ordinary product. On other devices it is the product that XLA makes of it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Array

from dpdist.mechanism.clipping.flatten import call, inner
from dpdist.mechanism.clipping.graph import read


def with_flat_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the same values whose products contract one axis, wherever those axes are neighbours.

    Products inside a loop, a branch or an operation with a derivative of its own stay as they are.
    """

    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
    for equation in jaxpr.eqns:
        known |= zip(equation.outvars, _outputs(equation, read(equation.invars, known)), strict=True)
    return read(jaxpr.outvars, known)


def _outputs(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    if equation.primitive.name == "jit":  # a call, as of `jax.nn.softmax`
        return _evaluate(*inner(equation.params["jaxpr"]), operands)
    if equation.primitive.name == "dot_general":
        with equation.ctx.manager:
            return [_product(operands[0], operands[1], equation.params)]
    return call(equation, operands)


def _product(x: Array, y: Array, params: dict[str, Any]) -> Array:
    contracted, batch = params["dimension_numbers"]
    pairs = sorted(zip(*contracted, strict=True))
    if len(pairs) < 2 or any(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(pairs)):
        return lax.dot_general_p.bind(x, y, **params)
    (of_x, of_y), less = pairs[0], len(pairs) - 1
    numbers = (((of_x,), (of_y,)), (_moved(batch[0], of_x, less), _moved(batch[1], of_y, less)))
    x, y = _merged(x, of_x, less), _merged(y, of_y, less)
    return lax.dot_general_p.bind(x, y, **params | {"dimension_numbers": numbers})


def _merged(x: Array, axis: int, less: int) -> Array:
    """Reshape the axis and the `less` axes that follow it into one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + less + 1 :])


def _moved(axes: Sequence[int], axis: int, less: int) -> tuple[int, ...]:
    """Return the numbers of other axes after that."""
    return tuple(each - less * (each > axis) for each in axes)
