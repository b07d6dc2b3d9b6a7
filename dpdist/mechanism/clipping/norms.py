"""The norm of a sum of outer products: |sum_t l_t^T r_t|^2 = sum_{t,s} <l_t, l_s> <r_t, r_s>.

Under cancellation this sum is far smaller than its terms. In float32 the result could be wrong, even negative, and an
example would not be clipped. We therefore compute it in float64, where products of float32 numbers are exact, and add a
bound on the remaining rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def squared_norm(products: Sequence[tuple[Side, Side]]) -> tuple[Float64[Array, ""], Float64[Array, ""]]:
    """Return the squared norm of the sum of `left^T right` over all products, and the sum of |left_t| |right_t|.

    Both are float64. The first is an upper bound up to its last bits. The second bounds the magnitude of the summed
    terms.
    """
    products = _merged(products)
    rows = sum(left.length for left, _ in products) + sum(left.width + right.width for left, right in products)
    with jax.enable_x64(True):
        terms = sum((jnp.sum(left.row_norms() * right.row_norms()) for left, right in products), jnp.float64(0))
        total = sum((_pair(a, b, off_diagonal) for a, b, off_diagonal in _pairs(products)), jnp.float64(0))
        # n successive operations err by at most n 2^-53 times the sum of magnitudes (Higham 2002, section 3.1).
        error = 2.0**-53 * 2 * (rows + 4) * jnp.square(terms)
        return jnp.maximum(total, 0) + error, terms


def _merged(products: Sequence[tuple[Side, Side]]) -> list[tuple[Side, Side]]:
    """Concatenate the rows of all products of the same kind (which sides are one-hot)."""
    kinds: dict[tuple[bool, bool], list[tuple[Side, Side]]] = {}
    for left, right in products:
        kinds.setdefault((left.one_hot, right.one_hot), []).append((left, right))
    return [(_concatenate([a for a, _ in pairs]), _concatenate([b for _, b in pairs])) for pairs in kinds.values()]


def _concatenate(sides: Sequence[Side]) -> Side:
    one_hot = sides[0].one_hot
    return Side(jnp.concatenate([side.rows for side in sides], axis=0 if one_hot else 1), one_hot)


def _pairs(
    products: Sequence[tuple[Side, Side]],
) -> Iterator[tuple[tuple[Side, Side], tuple[Side, Side], bool]]:
    """Yield every unordered pair of row blocks once, and whether it is off the diagonal."""
    blocks = []
    for left, right in products:
        count = _BLOCKS if left.length >= _SMALLEST_SPLIT else 1
        edges = [left.length * i // count for i in range(count + 1)]
        blocks += [(left.part(a, b), right.part(a, b)) for a, b in pairwise(edges)]
    for i, j in combinations_with_replacement(range(len(blocks)), 2):
        yield blocks[i], blocks[j], i != j


def _pair(a: tuple[Side, Side], b: tuple[Side, Side], off_diagonal: bool) -> Array:
    """Return the terms of two row blocks; an off-diagonal pair stands for (a, b) and (b, a)."""
    return jnp.sum(_inner(a[0], b[0]) * _inner(a[1], b[1])) * (2 if off_diagonal else 1)


def _inner(a: Side, b: Side) -> Array:
    """Return the inner products of rows, [groups, t, s] in float64."""
    if a.one_hot and b.one_hot:
        return ((a.rows[:, None] == b.rows[None, :]) & (a.rows >= 0)[:, None])[None].astype(jnp.float64)
    if a.one_hot:
        picked = jnp.take(b.rows[0], jnp.maximum(a.rows, 0), axis=1).T
        return jnp.where((a.rows >= 0)[:, None], picked, 0)[None].astype(jnp.float64)
    if b.one_hot:
        return jnp.swapaxes(_inner(b, a), 1, 2)
    return jnp.einsum(
        "gtk,gsk->gts", a.rows.astype(jnp.float64), b.rows.astype(jnp.float64), precision=lax.Precision.HIGHEST
    )
