"""How much one example can add to a clipped sum that tensor cores compute: an upper bound, from computed numbers.

An example's gradient of one parameter is A^T G, with A [t, m] and G [t, n] whose entries fit the format (bfloat16 or
TF32). A tensor core multiplies them exactly and accumulates in float32, so three things are rounded, and a prime marks
what is exact. All bounds hold for every input, whatever cancels, in any order of summation.

1. The inner products P = fl(A A^T) and Q = fl(G G^T). Let a_t and b_t be upper bounds of the rows' norms |A_t| and
   |G_t|, from the diagonals of P and Q (`row_norms`). Then |P_ts - P'_ts| <= gamma(m) a_t a_s, and the same for Q.
   With P'Q' = PQ - dP Q - P dQ + dP dQ and R = sum a_t b_t, U^2 = sum |P_ts| b_t b_s, V^2 = sum a_t a_s |Q_ts|:
       |A^T G|^2 = sum P'_ts Q'_ts <= sum P_ts Q_ts + gamma(m) V^2 + gamma(n) U^2 + gamma(m) gamma(n) R^2.
2. The weight c, folded into G: W = fl(c G) = c G + D + E, where |D| <= (u + 2^-23) c |G| entry by entry. u is the
   format's unit roundoff; 2^-23 is for the product in float32 that is rounded first. E is what underflows. Then
       |A^T D|^2 = sum P'_ts <D_t, D_s> <= (u + 2^-23)^2 c^2 sum |P'_ts| b_t b_s, and sum |P'_ts| b_t b_s <= U^2 +
       gamma(m) R^2,
   and |A^T E| <= sum a_t |E_t| <= sqrt(n) 4 TINY sum a_t: c g, the product and what reads it lose at most TINY each.
3. The accumulation of A^T W, where the rows of all other examples are 0: they lose nothing, so this is gamma(t)
   |A|^T |W| entry by entry, of norm at most gamma(t) sum a_t |W_t|.

What other examples' rows do to the rounding of the sum, and this one's to theirs, is not in here: it is kappa of
docs/rounding.md, for which sum a_t |W_t| of every example is capped.

gamma(d) = ULPS (d + 16) 2^-24. A core adds N products and the accumulator at a time, aligned to the largest of them,
truncated to 24 + x bits, and truncates the sum to 24 bits. The largest is exact, so a step with j <= N products that
are not 0 loses at most (j 2^-x + 1) 2^-23 of the sum of magnitudes: by product 2 (2^-x + 1 / j) units of 2^-24. With
full steps that is 2.5 for a V100 (N 4, x 0), 1.25 or 1.5 for an A100 (bfloat16 8, 1; TF32 4, 1), 0.63 or 0.75 for an
H100 (16, 2; 8, 2); at worst, j = 1, it is 4, 3 and 2.5, and for float32 rounded to nearest 1 (Fasi et al. 2021, PeerJ
CS 7:e330; Khattak and Mikaitis 2025, arXiv 2512.07004; blocks of any order: Blanchard et al. 2020, SIAM J. Sci. Comput.
42(3)). What ULPS = 4 and the 16 leave is for the additions of split-K, for those of a parameter's uses, and for higher
orders: with full steps and y = 2.5 / 4 gamma, y / (1 - y) <= gamma if gamma <= 1/2.

Underflow. An operand, a product or a sum below TINY = 2^-126 may be read or given as 0. An inner product then errs by
up to sqrt(d) TINY (|A_t| + |A_s|) + underflow(d) more. `row_norms` adds FLOOR to norms, at most half of which is needed
for the norm itself. As gamma >= 2^-18, the rest adds over 2^-59 (|A_t| + |A_s|) + 2^-100 to gamma a_t a_s: more than
that, for d <= 2^23. In 3 it covers the operand A in the same way; W and the output have absolute terms.

Float64, in which all of this is computed, is covered by `_slack`. Infinite or NaN products give infinite or NaN bounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64

#: What accumulation may lose for each product, in units of 2^-24 of the sum of magnitudes.
ULPS = 4
#: The largest relative error of rounding to nearest in the format.
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "tf32": 2.0**-11}
#: Inner products of rows longer than LONGEST must be taken in pieces of PIECE columns, added up in float64.
LONGEST, PIECE = 4096, 1024
#: The smallest normal number of float32, bfloat16 and TF32, and what row norms are raised by for what is below it.
TINY, FLOOR = 2.0**-126, 2.0**-40

Found = Float64[Array | np.ndarray, "..."]


def gamma(terms: int) -> float:
    """Return what a sum of so many products may lose, relative to the sum of their magnitudes."""
    found = ULPS * (terms + 16) * 2.0**-24
    if found > 0.5:
        raise ValueError(f"no error bound for a product over {terms} terms: take a smaller physical batch")
    return found


def underflow(terms: int) -> float:
    """Return what a sum of so many products may lose to results below TINY: the product and the addition of each."""
    return 2 * (terms + 16) * TINY


def row_norms(diagonal: Float[Array | np.ndarray, "..."], width: int) -> Found:
    """Return upper bounds of the norms of rows of `width` columns, given their computed squares."""
    with jax.enable_x64(True):
        return _root(diagonal.astype("float64") / (1 - _row_gamma(width))) + FLOOR


class Terms(NamedTuple):
    """What the bounds are made of. Terms of ordered pairs of row blocks, of uses and of groups are added by `+`.

    All are float64. A parameter's rows are those of all its uses, one after the other; every ordered pair of blocks of
    them counts, so that an off-diagonal pair that is computed once is added twice. Groups have no pairs in common.
    """

    #: sum P_ts Q_ts, and a bound of its error.
    square: Found
    error: Found
    #: A bound of sum |P'_ts| b_t b_s. If G is on the left in some uses of a parameter only, it needs `magnitudes` here.
    left: Found
    #: sum a_t a_s b_t b_s = R^2, where R bounds the sum of magnitudes of the terms of A^T G; and sum a_t a_s.
    magnitudes: Found
    rows: Found

    def __add__(self, other: Terms) -> Terms:  # type: ignore[override]
        """Return the sums of fields."""
        with jax.enable_x64(True):
            return Terms(*(x + y for x, y in zip(self, other, strict=True)))


def terms_of(
    P: Float[Array | np.ndarray, "*groups t s"],
    Q: Float[Array | np.ndarray, "*groups t s"],
    a: tuple[Found, Found],
    b: tuple[Found, Found],
    width_left: int,
    width_right: int,
    exact_left: bool = False,
) -> Terms:
    """Return the terms of one ordered pair of row blocks, each [*groups].

    Args:
        P: the computed inner products of the left factor's rows, float32, or float64 where pieces were added up.
        Q: those of the right factor's rows, whose entries the weight is folded into.
        a: bounds of the norms of the left factor's rows t, [*groups, t], and of its rows s, [*groups, s].
        b: the same for the right factor.
        exact_left: P and the left norms are exact, as for one-hot rows, whose inner products only select.
    """
    with jax.enable_x64(True):
        P, Q, slack = P.astype("float64"), Q.astype("float64"), _slack(P.shape[-2] * P.shape[-1])
        lost_left, lost_right = 0.0 if exact_left else _row_gamma(width_left), _row_gamma(width_right)
        magnitudes = (a[0] * b[0]).sum(-1) * (a[1] * b[1]).sum(-1) * slack
        square, left, right = _sums(P * Q, _weighted(P, *b), _weighted(Q, *a))
        left, right = left * slack + lost_left * magnitudes, right * slack
        # |P_ts Q_ts| <= |P_ts| (1 + gamma) b_t b_s, so that `left` also bounds what float64 loses of the first sum.
        error = (lost_left * right + (lost_right + 2 * (slack - 1)) * left) * slack
        return Terms(square, error, left, magnitudes, a[0].sum(-1) * a[1].sum(-1) * slack)


def norm_bound(terms: Terms) -> Found:
    """Return an upper bound of the norm of the exact A^T G. (`square` may be negative, its sum with `error` cannot.)"""
    with jax.enable_x64(True):
        return _root(terms.square + terms.error) * _slack(1)


def contribution_bound(terms: Terms, u: float, contracted: int, n: int, entries: int) -> tuple[Found, Found]:
    """Return (relative, absolute): with a weight 0 <= c <= 1 the example adds at most c relative + absolute.

    So c = (C - absolute) / relative, rounded down, keeps it within C. For several parameters take the root of the sum
    of squares of either. An example needs c = 0 where relative^2 is beyond float32: c could not be rounded well.

    Args:
        u: the unit roundoff of the format that c G is rounded to; its square if the rest is kept as a second piece.
        contracted: the number of this example's rows in the products that are added up, of all uses and pieces.
        n: the number of columns of G.
        entries: the number of entries of the gradient, of all groups together.
    """
    with jax.enable_x64(True):
        # |W| <= 1.01 c |G| + |E|: 1 + u + 2^-23 of one piece, 1 + 2 u + u^2 + 2^-23 of two together, with u <= 2^-8.
        summing = 1.01 * gamma(contracted) * _root(terms.magnitudes)
        relative = norm_bound(terms) + (u + 2.0**-23) * _root(terms.left) + summing
        # Twice 2 above, since what underflows is summed with an error too.
        absolute = 8 * TINY * n**0.5 * _root(terms.rows) + underflow(contracted) * entries**0.5
        return relative * _slack(1), absolute * _slack(1)


def _row_gamma(width: int) -> float:
    return gamma(PIECE if width > LONGEST else width)


def _weighted(products: Any, rows: Found, columns: Found) -> Found:
    """Return |products_ts| rows_t columns_s."""
    return abs(products) * rows[..., :, None] * columns[..., None, :]


def _sums(*terms: Any) -> Any:
    """Return the sums over the last two axes: of JAX arrays by one reduction, for which XLA reads the products once."""
    if isinstance(terms[0], np.ndarray):
        return [each.sum((-2, -1)) for each in terms]
    zeros, axes = [jnp.float64(0)] * len(terms), (terms[0].ndim - 2, terms[0].ndim - 1)
    return lax.reduce(terms, tuple(zeros), lambda x, y: tuple(map(jnp.add, x, y)), axes)


def _root(x: Found) -> Found:
    with jax.enable_x64(True):
        return np.sqrt(x) if isinstance(x, np.ndarray) else jnp.sqrt(x)


def _slack(count: int) -> float:
    """Return 1 + the relative error of a float64 sum of so many terms >= 0, each made of a few operations.

    Successive operations err by 2^-53 each, in any order (Higham 2002, section 3.1). The 1,024 are for the operations
    in a term, and for adding up to 1,000 pairs, uses and groups later.
    """
    return 1 + (count + 1024) * 2.0**-52
