"""The norm of a sum of outer products: |sum_t l_t^T r_t|^2 = sum_{t,s} <l_t, l_s> <r_t, r_s>.

Under cancellation this sum is far smaller than its terms, and in float32 it can come out wrong, even negative, so that
an example would go unclipped. It is therefore taken in float64, in which products of float32 numbers are exact, and a
bound on what rounding is left is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

#: The inner products of t with s and of s with t are the same, so blocks beside the diagonal are computed once.
_BLOCKS = 4
#: Below so many rows one product is faster than the blocks' ten.
_SMALLEST_SPLIT = 128


class Side(NamedTuple):
    """One factor of one example: rows [groups, t, k], or [t] integers where it is one-hot (-1 is a row of zeros)."""

    rows: Array
    one_hot: bool

    @property
    def length(self) -> int:
        return self.rows.shape[-1] if self.one_hot else self.rows.shape[1]

    @property
    def width(self) -> int:
        return 1 if self.one_hot else self.rows.shape[2]

    def part(self, start: int, stop: int) -> Side:
        """Rows [start, stop)."""
        return Side(self.rows[start:stop] if self.one_hot else self.rows[:, start:stop], self.one_hot)

    def lengths(self) -> Float32[Array, "groups t"]:
        """The norm of every row."""
        if self.one_hot:
            return (self.rows >= 0)[None].astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(self.rows.astype(jnp.float32)), axis=-1))


def squared_norm(products: Sequence[tuple[Side, Side]]) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(the squared norm of the sum of `left^T right` over all products, sum of |left_t| |right_t|).

    The former is an upper bound but for float32's last bit; the latter bounds how large the terms are.
    """
    products = _merged(products)
    terms = sum((jnp.sum(left.lengths() * right.lengths()) for left, right in products), jnp.float32(0))
    rows = sum(left.length for left, _ in products) + sum(left.width + right.width for left, right in products)
    with jax.enable_x64(True):
        total = sum((_pair(a, b, twice) for a, b, twice in _pairs(products)), jnp.float64(0))
        # n operations in a row err by at most n 2^-53 of the sum of magnitudes (Higham 2002, section 3.1).
        error = 2.0**-53 * 2 * (rows + 4) * jnp.square(terms.astype(jnp.float64))
        return (jnp.maximum(total, 0) + error).astype(jnp.float32), terms


def _merged(products: Sequence[tuple[Side, Side]]) -> list[tuple[Side, Side]]:
    """As few products as there are kinds, their rows one after the other."""
    kinds: dict[tuple[bool, bool], list[tuple[Side, Side]]] = {}
    for left, right in products:
        kinds.setdefault((left.one_hot, right.one_hot), []).append((left, right))
    return [(_concatenate([a for a, _ in pairs]), _concatenate([b for _, b in pairs])) for pairs in kinds.values()]


def _concatenate(sides: Sequence[Side]) -> Side:
    kind = sides[0].one_hot
    return Side(jnp.concatenate([side.rows for side in sides], axis=0 if kind else 1), kind)


def _pairs(
    products: Sequence[tuple[Side, Side]],
) -> Iterator[tuple[tuple[Side, Side], tuple[Side, Side], bool]]:
    """All pairs of blocks of rows, each once, and whether it counts twice."""
    blocks = []
    for left, right in products:
        count = _BLOCKS if left.length >= _SMALLEST_SPLIT else 1
        edges = [left.length * i // count for i in range(count + 1)]
        blocks += [(left.part(a, b), right.part(a, b)) for a, b in pairwise(edges)]
    for i, j in combinations_with_replacement(range(len(blocks)), 2):
        yield blocks[i], blocks[j], i != j


def _pair(a: tuple[Side, Side], b: tuple[Side, Side], twice: bool) -> Array:
    return jnp.sum(_inner(a[0], b[0]) * _inner(a[1], b[1])) * (2 if twice else 1)


def _inner(a: Side, b: Side) -> Array:
    """[groups, t, s] inner products of rows, in float64."""
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
