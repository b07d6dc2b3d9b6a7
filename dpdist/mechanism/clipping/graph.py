"""Trace a one-example loss into a flat jaxpr and mark every equation that combines a parameter with data.

A value is either parameter-derived (or constant), and then the same for every example, or data-derived. An equation
with inputs of both kinds is a *use* of the parameters behind it; `flatten` brings them all to the top level.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from dpdist.mechanism.clipping.flatten import FLAT, Origin, call, differentiable, flatten, origins, shape_of
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.mechanism.clipping.separate import UnsupportedLossError, naming_axes, require_separate
from dpdist.mechanism.clipping.view import View, whole

#: Values by variable of a jaxpr; looked up by an equation's inputs, whose type allows literals too.
Values = dict[Any, Any]
#: What becomes of a value, and of the gradient at it.
Changes = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Use:
    """An equation that combines parameters with data."""

    equation: JaxprEqn
    #: Positions of the inputs through which gradients flow to parameters.
    operands: tuple[int, ...]
    #: Numbers of the leaves that those gradients reach.
    leaves: frozenset[int]
    #: Positions of the differentiable outputs that the loss's gradient reaches.
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """The loss as a flat jaxpr of (parameter leaves, example leaves), and what its equations combine."""

    closed: ClosedJaxpr
    #: The variables that are the parameter leaves, and those that are the example's leaves, in order.
    params: tuple[Var, ...]
    example: tuple[Var, ...]
    #: The origin of every variable.
    origins: dict[Any, Origin]
    #: The parameter-derived variables that are views of exactly one leaf.
    views: dict[Any, View]
    uses: tuple[Use, ...]

    @property
    def constants(self) -> Values:
        """The constants that the loss closes over."""
        return dict(zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True))

    def origin(self, atom: Any) -> Origin:
        """Return the origin of an equation's input."""
        return Origin() if isinstance(atom, Literal) else self.origins[atom]

    def of_data(self, equation: JaxprEqn) -> bool:
        """Return whether an equation's outputs are different for every example."""
        return any(self.origin(atom).data for atom in equation.invars)

    def compute_params(self, leaves: Sequence[Any]) -> Values:
        """Compute every parameter-derived value; returns them and the constants."""
        known = self.constants | dict(zip(self.params, leaves, strict=True))
        for equation in self.closed.jaxpr.eqns:
            if not self.of_data(equation):
                run(equation, known)
        return known

    def compute_loss(
        self, shared: Values, example: Sequence[Any], shifts: Sequence[Sequence[Any]], settle: Mapping[Any, Changes]
    ) -> tuple[Any, list[list[Any]]]:
        """Compute the loss of one example, with `shifts[u][j]` added to output number `uses[u].outputs[j]` of use u.

        The derivative with respect to a shift, at zero, is the gradient of the loss at that output.

        Args:
            shared: what `compute_params` returned.
            example: the example's leaves.
            shifts: zeros of the outputs' shapes.
            settle: by data-derived variable, what becomes of its value and of the gradient at it, for all that reads
                them: so that what clipping works with is not a second copy.

        Returns:
            The loss, and for every use its equation's inputs: the data-derived ones, and None for the others.
        """
        known = shared | dict(zip(self.example, example, strict=True))
        known |= {v: changed(settle[v], known[v]) for v in self.example if v in settle}
        kept: list[list[Any]] = []
        uses = iter(zip(self.uses, shifts, strict=True))
        use, shift = next(uses, (None, ()))
        for equation in self.closed.jaxpr.eqns:
            if not self.of_data(equation):
                continue
            run(equation, known)
            if use is not None and equation is use.equation:
                for position, addend in zip(use.outputs, shift, strict=True):
                    known[equation.outvars[position]] += addend
                kept.append([known[v] if self.origin(v).data else None for v in equation.invars])
                use, shift = next(uses, (None, ()))
            known |= {v: changed(settle[v], known[v]) for v in equation.outvars if v in settle}
        (loss,) = self.closed.jaxpr.outvars
        return known[loss], kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def changed(changes: Changes, x: Any) -> Any:
    """Return the change of a value, which its derivative does not see; its gradient is changed on the way back."""
    return changes[0](x)


changed.defvjp(lambda changes, x: (changes[0](x), None), lambda changes, _, gradient: (changes[1](gradient),))


def run(equation: JaxprEqn, known: Values) -> None:
    """Compute one equation of a jaxpr, given the values of its inputs, and add those of its outputs."""
    known |= zip(equation.outvars, call(equation, read(equation.invars, known)), strict=True)


def read(atoms: Iterable[Any], known: Values) -> list[Any]:
    """Return the values of variables and literals."""
    return [atom.val if isinstance(atom, Literal) else known[atom] for atom in atoms]


def refuse_complex(params: Any, frozen: Collection[str]) -> None:
    """Raise UnsupportedLossError if a parameter that trains is complex: its imaginary part would not be clipped."""
    for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
        if path not in frozen and jnp.iscomplexobj(leaf):
            raise UnsupportedLossError(
                f"{path} is {jnp.result_type(leaf)}: give its real and imaginary parts as two parameters"
            )


def trace(
    loss_fn: Callable[[Any, Any], Any], params: Any, example: Any, frozen: Collection[str] = frozenset()
) -> Graph:
    """Trace `loss_fn(params, example)` into a graph.

    Args:
        loss_fn: maps one example to a floating-point scalar.
        params: pytree of arrays or shapes.
        example: pytree of shapes of one example, without a batch axis.
        frozen: paths of parameters that do not train; they count as constants.

    Raises:
        UnsupportedLossError: the loss is not a floating-point scalar, a parameter that trains is complex, or one
            example could see another.
    """
    refuse_complex(params, frozen)
    with naming_axes():
        found = jax.tree.leaves(jax.eval_shape(loss_fn, params, example))
    if len(found) != 1 or found[0].shape != () or not jnp.issubdtype(found[0].dtype, jnp.floating):
        raise UnsupportedLossError(f"the loss of one example must be a floating-point scalar, not {found}")
    zero = jax.ShapeDtypeStruct((), found[0].dtype)
    # The zero counts as data. So even a loss, or a term of it, that depends on the parameters alone has a use.
    closed = jax.make_jaxpr(lambda params, example, zero: loss_fn(params, example) + zero)(params, example, zero)
    require_separate(closed.jaxpr)
    paths = paths_of(params)
    of_params = [
        Origin(leaves=frozenset({number}) if path not in frozen and differentiable(v) else frozenset())
        for number, (path, v) in enumerate(zip(paths, closed.jaxpr.invars, strict=False))
    ]
    of_inputs = [*of_params, *(Origin(data=True) for _ in closed.jaxpr.invars[len(paths) :])]
    return _marked(flatten(closed, of_inputs), of_inputs, len(paths))


def _marked(closed: ClosedJaxpr, of_inputs: Sequence[Origin], leaves: int) -> Graph:
    """Find origins, views and uses in a flat jaxpr, whose first inputs are so many parameter leaves."""
    jaxpr = closed.jaxpr
    graph = Graph(
        closed=closed,
        params=tuple(jaxpr.invars[:leaves]),
        example=tuple(jaxpr.invars[leaves:]),
        origins=dict.fromkeys(jaxpr.constvars, Origin()) | dict(zip(jaxpr.invars, of_inputs, strict=True)),
        views={v: whole(n, shape_of(v).shape) for n, v in enumerate(jaxpr.invars[:leaves]) if of_inputs[n].leaves},
        uses=(),
    )
    uses = []
    for equation in jaxpr.eqns:
        inputs = [graph.origin(atom) for atom in equation.invars]
        graph.origins.update(zip(equation.outvars, origins(equation, inputs), strict=True))
        operands = tuple(i for i, each in enumerate(inputs) if each.leaves)
        if not any(each.data for each in inputs):
            if len(operands) == 1 and (view := _viewed(graph, equation, operands[0])) is not None:
                graph.views[equation.outvars[0]] = view
        elif operands and equation.primitive.name not in FLAT:
            real = tuple(j for j, v in enumerate(equation.outvars) if differentiable(v))
            uses.append(Use(equation, operands, frozenset().union(*(each.leaves for each in inputs)), real))
    return replace(graph, uses=_reached(graph, uses))


def _viewed(graph: Graph, equation: JaxprEqn, operand: int) -> View | None:
    """Return the view that an equation makes of its parameter operand; None if it does more than move entries."""
    before = graph.views.get(equation.invars[operand])
    if before is None:
        return None
    constants = graph.constants
    known = [atom.val if isinstance(atom, Literal) else constants.get(atom) for atom in equation.invars]
    known = [None if isinstance(constant, jax.core.Tracer) else constant for constant in known]
    return before.through(equation.primitive.name, equation.params, shape_of(equation.outvars[0]), known)


def _reached(graph: Graph, uses: Sequence[Use]) -> tuple[Use, ...]:
    """Drop uses, and outputs of uses, that the loss's gradient does not reach: they need no derivative."""
    live = set(graph.closed.jaxpr.outvars)
    for equation in reversed(graph.closed.jaxpr.eqns):
        if equation.primitive.name not in FLAT and not live.isdisjoint(equation.outvars):
            live.update(v for v in equation.invars if not isinstance(v, Literal) and differentiable(v))
    kept = [replace(use, outputs=tuple(j for j in use.outputs if use.equation.outvars[j] in live)) for use in uses]
    return tuple(use for use in kept if use.outputs)
