"""The norm of a sum of outer products: |sum_t l_t^T r_t|^2 = sum_{t,s} <l_t, l_s> <r_t, r_s>.

Under cancellation this sum is far smaller than its terms. In float32 the result could be wrong, even negative, and an
example would not be clipped. Here it is computed in float64, where products of float32 numbers are exact, and a bound
on the remaining rounding error is added. `tensor_products` computes it in float32 with a larger bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float64

#: Rows are split into this many blocks. The term (t, s) equals (s, t), so each off-diagonal pair is computed once.
_BLOCKS = 4
#: With fewer rows than this, one product is faster than the ten of four blocks.
_SMALLEST_SPLIT = 128


class Side(NamedTuple):
    """One factor of one example: rows [groups, t, k]; if `one_hot`, row numbers [t] instead (-1: a row of zeros)."""

    rows: Array
    one_hot: bool

    @property
    def length(self) -> int:
        """The number of rows t."""
        return self.rows.shape[-1] if self.one_hot else self.rows.shape[1]

    @property
    def width(self) -> int:
        """The number of columns k that are summed over; 1 if one-hot."""
        return 1 if self.one_hot else self.rows.shape[2]

    def part(self, start: int, stop: int) -> Side:
        """Return rows [start, stop)."""
        return Side(self.rows[start:stop] if self.one_hot else self.rows[:, start:stop], self.one_hot)

    def row_norms(self) -> Float64[Array, "groups t"]:
        """Return the L2 norm of every row, in float64."""
        if self.one_hot:
            return (self.rows >= 0)[None].astype(jnp.float64)
        return jnp.sqrt(jnp.sum(jnp.square(self.rows.astype(jnp.float64)), axis=-1))


class Product(NamedTuple):
    """A use's part of a gradient: left^T right, summed over rows."""

    left: Side
    right: Side
    #: True if the weight of an example is folded into `left`: a parameter that is transposed between its uses.
    swapped: bool = False

    def part(self, start: int, stop: int) -> Product:
        """Return rows [start, stop) of both factors."""
        return Product(self.left.part(start, stop), self.right.part(start, stop), self.swapped)


def squared_norm(products: Sequence[Product]) -> tuple[Float64[Array, ""], Float64[Array, ""]]:
    """Return the squared norm of the sum of `left^T right` over all products, and the sum of |left_t| |right_t|.

    Both are float64. The first is an upper bound up to its last bits. The second bounds the magnitude of the summed
    terms.
    """
    products = merged(products)
    rows = sum(each.left.length + each.left.width + each.right.width for each in products)
    with jax.enable_x64(True):
        terms = sum((jnp.sum(x.left.row_norms() * x.right.row_norms()) for x in products), jnp.float64(0))
        pairs = combinations_with_replacement(blocks(products, _SMALLEST_SPLIT), 2)
        total = sum((_pair(a, b) * (1 if a is b else 2) for a, b in pairs), jnp.float64(0))
        # n successive operations err by at most n 2^-53 times the sum of magnitudes (Higham 2002, section 3.1).
        error = 2.0**-53 * 2 * (rows + 4) * jnp.square(terms)
        return jnp.maximum(total, 0) + error, terms


def merged(products: Sequence[Product]) -> list[Product]:
    """Concatenate the rows of all products of the same kind."""
    kinds: dict[tuple[bool, bool, bool], list[Product]] = {}
    for each in products:
        kinds.setdefault((each.left.one_hot, each.right.one_hot, each.swapped), []).append(each)
    return [
        Product(_concatenate([x.left for x in alike]), _concatenate([x.right for x in alike]), swapped)
        for (_, _, swapped), alike in kinds.items()
    ]


def _concatenate(sides: Sequence[Side]) -> Side:
    one_hot = sides[0].one_hot
    return Side(jnp.concatenate([side.rows for side in sides], axis=0 if one_hot else 1), one_hot)


def blocks(products: Sequence[Product], smallest: int) -> list[Product]:
    """Split products of at least so many rows into blocks: terms of each unordered pair of blocks are needed once."""
    found = []
    for each in products:
        count = _BLOCKS if each.left.length >= smallest else 1
        edges = [each.left.length * i // count for i in range(count + 1)]
        found += [each.part(a, b) for a, b in pairwise(edges)]
    return found


def _pair(a: Product, b: Product) -> Float64[Array, ""]:
    return jnp.sum(inner_products(a.left, b.left, _float64) * inner_products(a.right, b.right, _float64))


def inner_products(a: Side, b: Side, product: Callable[[Array, Array], Array]) -> Array:
    """Return the inner products of rows, [groups, t, s].

    Args:
        product: computes them for rows [groups, t, k] and [groups, s, k]; where a side is one-hot they are exact.
    """
    if a.one_hot and b.one_hot:
        return ((a.rows[:, None] == b.rows[None, :]) & (a.rows >= 0)[:, None])[None].astype(jnp.float32)
    if a.one_hot:
        picked = jnp.take(b.rows[0], jnp.maximum(a.rows, 0), axis=1).T
        return jnp.where((a.rows >= 0)[:, None], picked, 0)[None].astype(jnp.float32)
    if b.one_hot:
        return jnp.swapaxes(inner_products(b, a, product), 1, 2)
    return product(a.rows, b.rows)


def _float64(a: Array, b: Array) -> Float64[Array, "groups t s"]:
    return jnp.einsum("gtk,gsk->gts", a.astype(jnp.float64), b.astype(jnp.float64), precision=lax.Precision.HIGHEST)
