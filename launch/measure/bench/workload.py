"""What one example costs: the matrix products of a loss and the uses of its parameters, found by tracing shapes.

Nothing is computed and no parameter gets memory, so that a model of any size can be looked at anywhere.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.mechanism.clipping.factors import Factors
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.mechanism.clipping.strategy import Strategy
from dpdist.models import build, example_loss
from dpdist.program.gradients import choose_strategies
from dpdist_launch.measure.bench.tasks import TASKS, in_dtype

#: The uses of one parameter by group, as a `Preference` gets them.
Groups = tuple[tuple[Factors, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A parameter: its size, and its uses where its gradient has factors."""

    path: str
    size: int
    #: Empty where the gradient has no factors, so that it can only be instantiated.
    groups: Groups


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One example's products, as far as a roofline looks at them.

    A product is *passed back* where its result depends on a parameter that trains: only then is there a gradient at its
    data. Where all parameters train, that is every product.
    """

    #: The parameters that train.
    leaves: tuple[Leaf, ...]
    #: Operations (two a multiply-add) of products of data with parameters; and of those passed back, and of those
    #: with parameters that train.
    parameter_flops: float
    back_flops: float
    weight_flops: float
    #: Operations of products of data with data: attention; and of those passed back.
    data_flops: float
    data_back_flops: float
    #: Bytes of data-derived operands and results of all these products; of those passed back; of the largest.
    moved: float
    moved_back: float
    largest: float

    @property
    def sharing(self) -> dict[int, int]:
        """Return how many uses have the same data operand, by the operand's number."""
        counts: dict[int, int] = {}
        for leaf in self.leaves:
            for use in (use for group in leaf.groups for use in group if not use.one_hot):
                counts[use.data] = counts.get(use.data, 0) + 1
        return counts


def workload_of(
    loss: Callable[[Any, Any], Any], params: Any, example: Any, *, frozen: Collection[str] = frozenset()
) -> Workload:
    """Trace `loss(params, example)`; both arguments are pytrees of shapes, of one example.

    Args:
        frozen: paths of the parameters that do not train.
    """
    found: list[Groups] = []

    def record(groups: Sequence[Sequence[Factors]]) -> tuple[Strategy, dict[str, float]]:
        found.append(tuple(map(tuple, groups)))
        return "instantiate", {}

    # `choose_strategies` asks the preference about the parameters whose gradients have factors, in their order.
    leaves = []
    for leaf in choose_strategies(loss, params, example, prefer=record, frozen=frozen):
        leaves.append(Leaf(path=leaf.path, size=math.prod(leaf.shape), groups=() if leaf.reason else found.pop(0)))
    closed = jax.make_jaxpr(loss)(params, example)
    kinds = [_PARAMETER if path in frozen else _PARAMETER | _TRAINS for path in paths_of(params)]
    products = list(_products(closed.jaxpr, kinds + [_DATA] * len(jax.tree.leaves(example)), 1))
    with_parameters = [each for each in products if not each.data_only]
    of_data = [each for each in products if each.data_only]
    return Workload(
        leaves=tuple(leaves),
        parameter_flops=sum(each.flops for each in with_parameters),
        back_flops=sum(each.flops for each in with_parameters if each.back),
        weight_flops=sum(each.flops for each in with_parameters if each.trains),
        data_flops=sum(each.flops for each in of_data),
        data_back_flops=sum(each.flops for each in of_data if each.back),
        moved=sum(each.moved for each in products),
        moved_back=sum(each.moved for each in products if each.back),
        largest=max((each.largest for each in products), default=0.0),
    )


#: What a value comes from, each a bit: parameters, among them some that train, data.
_CONSTANT, _PARAMETER, _TRAINS, _DATA = 0, 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class _Product:
    flops: float
    #: True if both operands are data-derived, False if one comes from parameters.
    data_only: bool
    #: True if the result depends on a parameter that trains; and if an operand without data does.
    back: bool
    trains: bool
    #: Bytes of the data-derived operands and of the result; `largest` is those of one call.
    moved: float
    largest: float


def _products(jaxpr: Any, kinds: Sequence[int], times: int) -> Iterator[_Product]:
    """Yield the matrix products and convolutions of a jaxpr that runs `times` times and has inputs of these kinds.

    What its equations call is looked into. Products without data are the same for all examples, and those of data with
    constants (to resize an image) have no gradient: neither is yielded.
    """
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    for equation in jaxpr.eqns:
        inputs = [_CONSTANT if hasattr(atom, "val") else known.get(atom, _CONSTANT) for atom in equation.invars]
        kind = functools.reduce(operator.or_, inputs, _CONSTANT)
        for inner in _called(equation):
            # A branch of `cond` has no operand for the index; what else does not fit gets the equation's own kind.
            fits = len(inner.invars) <= len(inputs)
            passed = inputs[len(inputs) - len(inner.invars) :] if fits else [kind] * len(inner.invars)
            yield from _products(inner, passed, times * equation.params.get("length", 1))
        is_product = equation.primitive.name in ("dot_general", "conv_general_dilated")
        if is_product and kind & _DATA and _CONSTANT not in inputs[:2]:
            yield _product(equation, inputs[:2], times)
        known.update(dict.fromkeys(equation.outvars, kind))


def _called(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs that an equation runs. A rule of derivation (`custom_vjp`) is a function, and not among them."""
    for held in equation.params.values():
        for each in held if isinstance(held, tuple) else (held,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


def _product(equation: Any, kinds: Sequence[int], times: int) -> _Product:
    data = [bool(kind & _DATA) for kind in kinds]
    left, right = (atom.aval for atom in equation.invars[:2])
    out = equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(left.shape[axis] for axis in contracted)
    else:
        terms = math.prod(right.shape) // right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    moved = sum(_bytes(aval) for aval, derived in ((left, data[0]), (right, data[1]), (out, True)) if derived)
    return _Product(
        flops=times * 2.0 * math.prod(out.shape) * terms,
        data_only=all(data),
        back=any(kind & _TRAINS for kind in kinds),
        trains=any(kind & _TRAINS and not kind & _DATA for kind in kinds),
        moved=float(times * moved),
        largest=float(moved),
    )


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * int(jnp.dtype(aval.dtype).itemsize)


#: Models without an option `dtype`.
FLOAT32_ONLY = frozenset({"mnist-cnn"})


def named(name: str, dtype: str) -> Workload:
    """Return the workload of a model of `TASKS` whose products are in `dtype`, `float32` or `bfloat16`."""
    task = in_dtype(TASKS[name], dtype)
    model = build(task.model, example=task.shapes(), classes=task.classes)
    return workload_of(example_loss(model), jax.eval_shape(model.init, jax.random.key(0)), task.shapes())
