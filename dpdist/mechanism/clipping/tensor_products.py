"""Norms and weighted sums from factors in a short format, whose products run on tensor cores.

Both factors are rounded once: to bfloat16 if the model computes in it, to TF32 otherwise. That is done in place, where
they arise, so that the loss reads the same arrays; but float32 values only if nothing but products with parameters
reads them, whose operands tensor cores round anyway: there the loss stays what it is. Others are rounded in copies.

Every product of factors has float32 output, and `tensor_cores` bounds what it may lose. `Precision.HIGH` is TF32 on
GPUs that have it and float32 elsewhere: either multiplies TF32 numbers exactly. Long rows are multiplied in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import combinations_with_replacement
from operator import add
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Bool, Float32

from dpdist.mechanism.clipping.factors import Factors
from dpdist.mechanism.clipping.flatten import shape_of
from dpdist.mechanism.clipping.graph import Changes, Graph
from dpdist.mechanism.clipping.norms import Product, Side, blocks, inner_products, merged
from dpdist.mechanism.clipping.tensor_cores import LONGEST, PIECE, Found, Terms, row_norms, terms_of
from dpdist.mechanism.clipping.weights import rounded_float32

#: `float32`: not for tensor cores, norms in float64 and sums in float32.
Format = Literal["float32", "tf32", "bfloat16"]
#: With fewer rows than this, one large product is faster on tensor cores than the ten small ones of four blocks.
_SMALLEST_SPLIT = 1024
#: The precisions of a product whose float32 operands tensor cores may round.
_LOOSE = (None, (lax.Precision.DEFAULT,) * 2, (lax.Precision.HIGH,) * 2)


class Rounding(NamedTuple):
    """How the factors of one use are rounded."""

    fmt: Format
    #: Whether what is not finite becomes the largest number: the inner products of rows, which are taken, tell of it.
    finite: bool
    #: Whether the data operand, and the gradient at the output, are rounded in place.
    operand: bool
    output: bool

    def copy(self, x: Array) -> Array:
        """Return x rounded."""
        return fitted(x, self.fmt, finite=self.finite)


def roundings(graph: Graph, factors: Mapping[int, Factors], ghosts: set[int], tensor: bool) -> dict[int, Rounding]:
    """Return the rounding of every use that has factors.

    Args:
        ghosts: the uses whose inner products of rows are taken.
        tensor: without it, nothing is rounded for tensor cores.
    """
    found = {}
    for u, each in factors.items():
        equation, fmt = graph.uses[u].equation, _format(graph, factors, u) if tensor else "float32"
        finite = tensor and u in ghosts
        readers = (reader for reader in graph.closed.jaxpr.eqns if any(v is each.data for v in reader.invars))
        # A convolution may skip entries, which others read and no inner product would tell of.
        whole = equation.primitive.name == "dot_general" or not finite
        operand = not each.one_hot and whole and _in_place(graph, fmt, each.data, readers)
        found[u] = Rounding(fmt, finite, operand, _in_place(graph, fmt, equation.outvars[0], [equation]))
    return found


def changes(graph: Graph, factors: Mapping[int, Factors], found: Mapping[int, Rounding]) -> dict[Any, Changes]:
    """Return what becomes of the values that are rounded in place: see `Graph.compute_loss`."""
    operands = {factors[u].data: each for u, each in sorted(found.items(), key=lambda x: x[1].finite) if each.operand}
    outputs = {graph.uses[u].equation.outvars[0]: each for u, each in found.items() if each.output}
    values, gradients = ({v: each.copy for v, each in places.items()} for places in (operands, outputs))
    return {v: (values.get(v, lambda x: x), gradients.get(v, lambda x: x)) for v in (*values, *gradients)}


def _format(graph: Graph, factors: Mapping[int, Factors], u: int) -> Format:
    """Return the format of use `u`, which is that of all uses of a parameter; float16, too, fits TF32."""
    alike = [(v, each) for v, each in factors.items() if graph.uses[v].leaves == graph.uses[u].leaves]
    places = [graph.uses[v].equation.outvars[0] for v, _ in alike] + [f.data for _, f in alike if not f.one_hot]
    return "bfloat16" if all(shape_of(v).dtype == jnp.bfloat16 for v in places) else "tf32"


def _in_place(graph: Graph, fmt: Format, value: Any, readers: Iterable[JaxprEqn]) -> bool:
    """Return whether a value with these readers, or the gradient at it, is rounded in place."""

    def rounds(reader: JaxprEqn) -> bool:
        # An inner product of data with data is a multiplication and a sum for XLA. What has a precision is a product.
        with_parameter = any(not graph.origin(v).data for v in reader.invars)
        return with_parameter and reader.params.get("precision", "none") in _LOOSE

    return fmt == "bfloat16" or (fmt == "tf32" and shape_of(value).dtype == jnp.float32 and all(map(rounds, readers)))


def fitted(x: Array, fmt: Format, *, finite: bool = False) -> Array:
    """Round to the format by an operation that XLA keeps; TF32 numbers are held as float32.

    Args:
        finite: what is not finite becomes the largest bfloat16, so that a weight of 0 removes it. The inner product of
            its row with itself is still infinite, and so is the norm of its example.
    """
    exact = rounded_float32(x).astype(jnp.float32)
    if fmt == "float32":
        return exact
    rounded = lax.reduce_precision(exact, exponent_bits=8, mantissa_bits={"tf32": 10, "bfloat16": 7}[fmt])
    if finite:
        # By bits, in which NaN is above infinity: XLA would store what a comparison finds.
        found = lax.bitcast_convert_type(rounded, jnp.uint32)
        magnitude = jnp.minimum(found & np.uint32(0x7FFFFFFF), np.uint32(0x7F7F0000))
        rounded = lax.bitcast_convert_type(magnitude | (found & np.uint32(0x80000000)), jnp.float32)
    return rounded.astype(jnp.bfloat16 if fmt == "bfloat16" else jnp.float32)


def product(equation: str, a: Array, b: Array, fmt: Format) -> Float32[Array, "..."]:
    """Return the `einsum` of two arrays that fit the format, with float32 output."""
    precision = lax.Precision.HIGHEST if fmt == "float32" else lax.Precision.HIGH
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def folded(scale: Float32[Array, " p"], used: Bool[Array, " p"], factor: Array, fmt: Format) -> Array:
    """Return every example's factor times its weight, rounded to the format; 0 where the example is not used."""
    weighted = jax.vmap(lambda c, kept, rows: jnp.where(kept, rows.astype(jnp.float32) * c, 0.0))(scale, used, factor)
    return fitted(weighted, fmt)


def terms_of_products(products: Sequence[Product]) -> Terms:
    """Return what bounds the norm of the sum of `left^T right` over all products of one example, whose factors fit."""
    parts = blocks(merged(products), _SMALLEST_SPLIT)
    with jax.enable_x64(True):
        norms = [tuple(_row_norms(side) for side in (part.left, part.right)) for part in parts]
        total, folding = None, {False: jnp.float64(0), True: jnp.float64(0)}
        for (a, norms_a), (b, norms_b) in combinations_with_replacement(zip(parts, norms, strict=True), 2):
            terms = _pair(a, b, norms_a, norms_b)
            terms = terms if a is b else terms + terms
            total = terms if total is None else total + terms
            if a.swapped == b.swapped:
                folding[a.swapped] += terms.left
        assert total is not None
        # The error of folding, |A^T D|, is at most the sum of that of the uses with the weight on either side.
        left = jnp.square(jnp.sqrt(folding[False]) + jnp.sqrt(folding[True]))
        rows = jnp.square(sum(jnp.sum(own[part.swapped]) for part, own in zip(parts, norms, strict=True)))
        return total._replace(left=left, rows=rows)


def _pair(a: Product, b: Product, norms_a: Sequence[Found], norms_b: Sequence[Found]) -> Terms:
    """Return the terms of an ordered pair of blocks, with the data's factor first where both have it on one side."""
    pairs = [(a.left, b.left, norms_a[0], norms_b[0]), (a.right, b.right, norms_a[1], norms_b[1])]
    (x, y, x_norms, y_norms), (z, w, z_norms, w_norms) = reversed(pairs) if a.swapped and b.swapped else pairs
    data, output = inner_products(x, y, _inner), inner_products(z, w, _inner)
    exact = x.one_hot or y.one_hot
    found = terms_of(data, output, (x_norms, y_norms), (z_norms, w_norms), x.width, z.width, exact_left=exact)
    return Terms(*(jnp.sum(field) for field in found))


def _row_norms(side: Side) -> Found:
    if side.one_hot:
        return (side.rows >= 0)[None].astype(jnp.float64)
    # XLA computes the product that the terms need once.
    return row_norms(jnp.diagonal(inner_products(side, side, _inner), axis1=1, axis2=2), side.width)


def _inner(a: Array, b: Array) -> Array:
    if a.shape[2] <= LONGEST:
        return product("gtk,gsk->gts", a, b, "tf32")
    pieces = range(0, a.shape[2], PIECE)
    with jax.enable_x64(True):
        return reduce(add, (_inner(a[..., i : i + PIECE], b[..., i : i + PIECE]).astype(jnp.float64) for i in pieces))
