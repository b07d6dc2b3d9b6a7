"""Trace a one-example loss into a flat graph and mark every equation that combines a parameter with data.

A value is either parameter-derived (or constant), and then the same for every example, or data-derived. An equation
with inputs of both kinds is a *use* of the parameters behind it. To find the uses, calls that involve parameters are
inlined and short scans unrolled. An equation with its own derivative rule (`custom_jvp`, `custom_vjp`) or with branches
(`cond`, `while`) stays one equation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import source_info_util  # JAX has no public name for the context of an equation's source line
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from dpdist.mechanism.clipping.paths import paths_of
from dpdist.mechanism.clipping.separate import UnsupportedLossError, naming_axes, require_separate, source_of
from dpdist.mechanism.clipping.view import View, whole

#: Primitives that only call another jaxpr, and the equation parameter that holds it.
_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
#: Primitives whose derivative is that of the jaxprs they hold, and the equation parameter that holds one or several.
_BODIES = {**_CALLS, "cond": "branches", "scan": "jaxpr"}
#: Primitives that no gradient passes through: their derivative is zero wherever it exists.
FLAT = frozenset({"stop_gradient", "sign", "floor", "ceil", "round"})
#: The longest scan that is unrolled; a longer one stays one equation, and its parameters' gradients are instantiated.
LONGEST_UNROLLED = 48


@dataclass(frozen=True)
class Value:
    """The static properties of one value in the graph."""

    #: Shape and dtype.
    aval: Any
    #: True if the value is data-derived, so different for every example.
    data: bool
    #: Numbers of the parameter leaves that a gradient at this value flows to; empty for data-derived values.
    leaves: frozenset[int] = frozenset()
    #: For a parameter-derived value that is a view of exactly one leaf: which view.
    view: View | None = None

    @property
    def differentiable(self) -> bool:
        """True if the dtype is floating-point or complex."""
        return bool(jnp.issubdtype(self.aval.dtype, jnp.inexact))


@dataclass(frozen=True)
class Node:
    """One equation: `outputs = call(*inputs)`, where inputs and outputs are value numbers."""

    name: str
    call: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    #: The JAX equation's parameters (strides, dimension numbers, ...).
    params: dict[str, Any]
    #: File and line of the user's code.
    source: str


@dataclass(frozen=True)
class Use:
    """A node that combines parameters with data."""

    node: Node
    #: Positions of the inputs through which gradients flow to parameters.
    operands: tuple[int, ...]
    #: Numbers of the leaves that those gradients reach.
    leaves: frozenset[int]
    #: Positions of the differentiable outputs that the loss's gradient reaches.
    outputs: tuple[int, ...]


@dataclass
class Graph:
    """The loss as nodes in an order in which they can be computed; values are referred to by number."""

    values: list[Value] = field(default_factory=list)
    #: Arrays of the constant values.
    constants: dict[int, Any] = field(default_factory=dict)
    #: The values that are the parameter leaves, in order.
    params: tuple[int, ...] = ()
    #: The values that are the example's leaves, in order.
    example: tuple[int, ...] = ()
    #: Nodes that compute the data-derived values.
    data_nodes: list[Node] = field(default_factory=list)
    #: Nodes that compute the parameter-derived values.
    param_nodes: list[Node] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    #: The value that is the loss.
    loss: int = -1

    @property
    def nodes(self) -> list[Node]:
        """All nodes, in an order in which they can be computed."""
        return [*self.param_nodes, *self.data_nodes]

    def aval(self, number: int) -> Any:
        """Return shape and dtype of a value."""
        return self.values[number].aval

    def compute_params(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """Compute every parameter-derived value; returns them and the constants by number."""
        known = dict(self.constants) | dict(zip(self.params, leaves, strict=True))
        for node in self.param_nodes:
            known.update(zip(node.outputs, node.call(*(known[i] for i in node.inputs)), strict=True))
        return known

    def compute_loss(
        self, shared: dict[int, Any], example: Sequence[Any], shifts: Sequence[Sequence[Any]]
    ) -> tuple[Any, list[dict[int, Any]]]:
        """Compute the loss of one example, with `shifts[u][j]` added to output number `uses[u].outputs[j]` of use u.

        The derivative with respect to a shift, at zero, is the gradient of the loss at that output.

        Args:
            shared: what `compute_params` returned.
            example: the example's leaves.
            shifts: zeros of the outputs' shapes.

        Returns:
            The loss, and the data operands of every use by value number.
        """
        known = shared | dict(zip(self.example, example, strict=True))
        kept: list[dict[int, Any]] = []
        uses = {id(use.node): (use, shift) for use, shift in zip(self.uses, shifts, strict=True)}
        for node in self.data_nodes:
            results = list(node.call(*(known[i] for i in node.inputs)))
            if id(node) in uses:
                use, shift = uses[id(node)]
                for position, addend in zip(use.outputs, shift, strict=True):
                    results[position] = results[position] + addend
                kept.append({i: known[i] for i in node.inputs if self.values[i].data})
            known.update(zip(node.outputs, results, strict=True))
        return known[self.loss], kept


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
    return _Tracer().run(closed, [path not in frozen for path in paths_of(params)])


class _Tracer:
    """Copies a jaxpr into a graph."""

    def __init__(self) -> None:
        self.graph = Graph()

    def run(self, closed: Any, trains: Sequence[bool]) -> Graph:
        """Copy the loss's whole jaxpr; `trains` says of each parameter leaf whether it trains."""
        graph, jaxpr = self.graph, closed.jaxpr
        numbers = []
        for position, variable in enumerate(jaxpr.invars):
            value = Value(variable.aval, position >= len(trains))
            if not value.data and trains[position] and value.differentiable:
                value = replace(value, leaves=frozenset({position}), view=whole(position, variable.aval.shape))
            numbers.append(self.new(value))
        graph.params, graph.example = tuple(numbers[: len(trains)]), tuple(numbers[len(trains) :])
        (graph.loss,) = self.copy(jaxpr, [self.constant(c) for c in closed.consts], numbers)
        self.drop_dead_uses()
        return graph

    def drop_dead_uses(self) -> None:
        """Drop uses, and outputs of uses, that the loss's gradient does not reach: they need no derivative."""
        live = {self.graph.loss}
        for node in reversed(self.graph.data_nodes):
            if node.name not in FLAT and not live.isdisjoint(node.outputs):
                live.update(i for i in node.inputs if self.graph.values[i].differentiable)
        kept = [(use, tuple(j for j in use.outputs if use.node.outputs[j] in live)) for use in self.graph.uses]
        self.graph.uses = [replace(use, outputs=outputs) for use, outputs in kept if outputs]

    def new(self, value: Value) -> int:
        self.graph.values.append(value)
        return len(self.graph.values) - 1

    def constant(self, array: Any) -> int:
        number = self.new(Value(jax.typeof(array), False))
        self.graph.constants[number] = array
        return number

    def copy(self, jaxpr: Jaxpr, constants: Sequence[int], inputs: Sequence[int]) -> list[int]:
        """Add the equations of `jaxpr`, given the numbers of its constants and inputs; returns those of its outputs."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def read(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add one equation, inlined or unrolled where it involves parameters; returns the numbers of its outputs."""
        values = [self.graph.values[i] for i in inputs]
        name = equation.primitive.name
        if any(value.leaves for value in values):
            if name in _CALLS:
                jaxpr, constants = _inner(equation.params[_CALLS[name]])
                return self.copy(jaxpr, [self.constant(c) for c in constants], inputs)
            if name == "scan" and any(v.data for v in values) and equation.params["length"] <= LONGEST_UNROLLED:
                return self.unroll(equation, inputs)
        return self.node(
            name, _bind(equation), inputs, [v.aval for v in equation.outvars], equation.params, source_of(equation)
        )

    def node(
        self,
        name: str,
        call: Callable[..., Sequence[Any]],
        inputs: Sequence[int],
        avals: Iterable[Any],
        params: dict[str, Any],
        source: str,
    ) -> list[int]:
        """Add a node, and a use if it combines parameters with data; returns the numbers of its outputs."""
        values = [self.graph.values[i] for i in inputs]
        data = any(value.data for value in values)
        leaves = frozenset().union(*(v.leaves for v in values if not v.data and name not in FLAT))
        operands = [value for value in values if value.leaves]
        outputs = []
        for aval in avals:
            value = Value(aval, data, frozenset() if data else leaves)
            if not data and not value.differentiable:
                value = Value(aval, False)  # no gradient flows through an integer
            elif not data and len(operands) == 1 and operands[0].view is not None:
                known = [self.graph.constants.get(i) for i in inputs]
                known = [None if isinstance(constant, jax.core.Tracer) else constant for constant in known]
                value = Value(aval, False, leaves, operands[0].view.through(name, params, aval, known))
            outputs.append(self.new(value))
        node = Node(name, call, tuple(inputs), tuple(outputs), params, source)
        if not data:
            self.graph.param_nodes.append(node)
            return outputs
        self.graph.data_nodes.append(node)
        through = tuple(i for i, value in enumerate(values) if not value.data and value.leaves)
        real = tuple(i for i, number in enumerate(outputs) if self.graph.values[number].differentiable)
        if through and real:
            self.graph.uses.append(Use(node, through, leaves, real))
        return outputs

    def unroll(self, equation: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add a scan step by step, so that each step's slice of a stacked parameter is a view of it."""
        source, steps = source_of(equation), range(equation.params["length"])
        jaxpr, constants = _inner(equation.params["jaxpr"])
        # A carry has the same shape inside and outside the scan; a scanned input has one axis less inside. We count
        # them by that because JAX releases store the counts differently.
        scanned = sum(_axes(v) > _axes(w) for v, w in zip(equation.invars, jaxpr.invars, strict=True))
        carried = sum(_axes(v) == _axes(w) for v, w in zip(equation.outvars, jaxpr.outvars, strict=True))
        stacked = inputs[len(inputs) - scanned :]
        fixed = inputs[: len(inputs) - scanned - carried]
        carry = inputs[len(fixed) : len(fixed) + carried]
        closed_over = [self.constant(c) for c in constants]
        rows: dict[int, list[int]] = {}
        for step in reversed(steps) if equation.params["reverse"] else steps:
            results = self.copy(jaxpr, closed_over, [*fixed, *carry, *(self.row(i, step, source) for i in stacked)])
            carry, rows[step] = results[:carried], results[carried:]
        stacks = []
        for position, variable in enumerate(equation.outvars[carried:]):
            parts = [rows[step][position] for step in steps]
            stacks += self.node("stack", lambda *xs: [jnp.stack(xs)], parts, [variable.aval], {}, source)
        return [*carry, *stacks]

    def row(self, number: int, index: int, source: str) -> int:
        """Add `value[index]`, written with operations that a `View` can follow."""
        shape, dtype = self.graph.aval(number).shape, self.graph.aval(number).dtype
        starts, limits = (index, *(0 for _ in shape[1:])), (index + 1, *shape[1:])
        (cut,) = self.node(
            "slice",
            lambda x: [jax.lax.slice(x, starts, limits)],
            [number],
            [jax.ShapeDtypeStruct((1, *shape[1:]), dtype)],
            {"start_indices": starts, "limit_indices": limits, "strides": None},
            source,
        )
        (row,) = self.node(
            "squeeze",
            lambda x: [jax.lax.squeeze(x, (0,))],
            [cut],
            [jax.ShapeDtypeStruct(shape[1:], dtype)],
            {"dimensions": (0,)},
            source,
        )
        return row


def bodies(node: Node) -> Iterator[tuple[Graph, list[int]]]:
    """Yield the jaxprs that a node runs: each as a graph with all its inputs as `example`, and its outputs' numbers.

    Yields nothing for a node with its own derivative rule, nor for a while loop, which cannot be differentiated at all.
    """
    held = node.params[_BODIES[node.name]] if node.name in _BODIES else ()
    for each in held if isinstance(held, tuple) else (held,):
        tracer, (jaxpr, constants) = _Tracer(), _inner(each)
        tracer.graph.example = tuple(tracer.new(Value(variable.aval, True)) for variable in jaxpr.invars)
        outputs = tracer.copy(jaxpr, [tracer.constant(c) for c in constants], tracer.graph.example)
        yield tracer.graph, outputs


def _inner(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the jaxpr that an equation holds and its constants; it may be a Jaxpr or a ClosedJaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _axes(atom: Any) -> int:
    return len(atom.aval.shape)


def _bind(equation: JaxprEqn) -> Callable[..., Sequence[Any]]:
    def call(*inputs: Any) -> Sequence[Any]:
        bound = equation.primitive.get_bind_params(equation.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # depends on the JAX release
        with source_info_util.user_context(equation.source_info.traceback), equation.ctx.manager:
            results = equation.primitive.bind(*functions, *inputs, **params)
        return results if equation.primitive.multiple_results else [results]

    return call
