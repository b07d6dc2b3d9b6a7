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

from dpdist.mechanism.clipping.bookkeeping import REFUSALS
from dpdist.mechanism.clipping.graph import FLAT, Graph, Node, bodies, trace
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.mechanism.clipping.separate import UnsupportedLossError

_REMEDY = "jax.custom_vjp to give it the rule that is missing"
_REMEDIES = {
    "while": "lax.scan, or lax.fori_loop with a trip count known when it is traced",
    "pure_callback": "a vmap_method, and jax.custom_vjp to give it a derivative",
}
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
    reaching = {n: graph.values[n].leaves for n in (*graph.params, *graph.example)}
    found = _fault(graph, [graph.loss], reaching)
    return None if found is None else UnsupportedLossError(_message(*found, paths_of(params)))


def _message(node: Node, leaves: Collection[int], refusal: Exception, paths: Sequence[str]) -> str:
    names = ", ".join(paths[n] for n in sorted(leaves)[:_SHOWN])
    more = f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else ""
    where = (
        f"which the gradient of {names}{more} goes through" if leaves else "which no parameter that trains goes into"
    )
    stop = ", or lax.stop_gradient on what goes in where no gradient is meant" if leaves else ""
    return (
        f"{node.name} at {node.source}, {where}, has no per-example derivative: "
        f"use {_REMEDIES.get(node.name, _REMEDY)}{stop} (JAX: {str(refusal).removesuffix('.')})"
    )


def _fault(
    graph: Graph, outputs: Sequence[int], reaching: Mapping[int, frozenset[int]]
) -> tuple[Node, frozenset[int], Exception] | None:
    """Find the last node whose derivative is needed but does not exist; None if all exist.

    Args:
        outputs: the values to differentiate.
        reaching: for every input of the graph, the numbers of the leaves that a gradient at it flows to.

    Returns:
        The node, the leaves whose gradient goes through it, and JAX's error.
    """
    nodes, reaching = graph.nodes, dict(reaching)
    for node in nodes:
        leaves = _behind(node, reaching) if node.name not in FLAT else frozenset()
        reaching |= {i: leaves if graph.values[i].differentiable else frozenset() for i in node.outputs}
    if _refusal(graph, 0, outputs, reaching) is None:
        return None

    # A shorter tail needs fewer derivatives, so the node at fault comes just before the longest tail that has them all.
    tails = range(1, len(nodes) + 1)
    number = bisect_left(tails, True, key=lambda start: _refusal(graph, start, outputs, reaching) is None)
    node, refusal = nodes[number], _refusal(graph, number, outputs, reaching)
    if refusal is None:
        return None
    leaves = _behind(node, reaching)
    for body, results in bodies(node):
        # A scan step's carry goes into the next step, so every input may depend on every parameter behind the scan.
        own = node.inputs[len(node.inputs) - len(body.example) :]  # without the branch index of a `cond`
        into = {
            i: leaves if node.name == "scan" else reaching.get(n, frozenset())
            for i, n in zip(body.example, own, strict=True)
        }
        inside = {i: behind if body.values[i].differentiable else frozenset() for i, behind in into.items()}
        if (found := _fault(body, results, inside)) is not None:
            return found
    return node, leaves, refusal


def _behind(node: Node, reaching: Mapping[int, frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*(reaching.get(i, frozenset()) for i in node.inputs))


def _refusal(
    graph: Graph, start: int, outputs: Sequence[int], reaching: Mapping[int, frozenset[int]]
) -> Exception | None:
    """Return JAX's error when it differentiates the nodes from `start` on by all their inputs; None if it can."""
    tail = graph.nodes[start:]
    later = {i for node in tail for i in node.outputs}
    axes = {i: 0 if graph.values[i].data else None for i in reaching if i not in later}

    def gradients(known: dict[int, Any]) -> Any:
        def results(moved: dict[int, Any]) -> list[Any]:
            values = graph.constants | known | moved
            for node in tail:
                values.update(zip(node.outputs, node.call(*(values[i] for i in node.inputs)), strict=True))
            return [values[i] for i in outputs if graph.values[i].differentiable]

        found, back = jax.vjp(results, {i: value for i, value in known.items() if reaching[i]})
        return back([jnp.ones_like(value) for value in found])

    two = {None: (), 0: (2,)}  # a batch of two examples is enough
    shapes = {i: jax.ShapeDtypeStruct(two[axis] + graph.aval(i).shape, graph.aval(i).dtype) for i, axis in axes.items()}
    try:
        jax.eval_shape(jax.vmap(gradients, in_axes=(axes,)), shapes)
    except REFUSALS as error:
        return error
    return None
