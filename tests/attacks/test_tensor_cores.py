"""One example through emulated tensor cores: it never adds more than C, and would with less of the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_attack import FAMILIES, Factors, Product, aimed, attempts, over_clip
from clipping_attack import bounds as bounds_of
from tensor_cores import CORES, Core, inner_products, product, rounded, terms

from dpdist.mechanism.clipping import tensor_cores

V100, A100, A100_TF32, H100, H100_TF32 = CORES


def test_no_example_adds_more_than_clip_norm() -> None:
    found = list(attempts(np.random.default_rng(0), 5000, 32))
    assert {each.family for each in found} == {family.__name__ for family in FAMILIES}
    assert {each.core for each in found} == {core.name for core in CORES}
    assert max(each.ratios.max() for each in found) <= 1
    assert max(each.ratios.max() for each in found) > 0.9999  # they are attacks


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_the_emulator_loses_what_is_below_the_last_place_and_nothing_else(core: Core) -> None:
    last = 2.0 ** -(23 + core.extra_bits)
    ones, whole = np.ones((1, 1, 100)), np.arange(100.0)[None, :, None]
    assert product(ones, whole, core) == product(ones, whole, core, split=3) == 99 * 100 / 2
    small = np.full((1, 100, 1), 0.875 * last)
    small[0, 0] = 1
    assert product(ones, small, core) == 1
    small[0, 0] = 0.5
    assert product(ones, small, core) > 0.5


class Example(NamedTuple):
    """One example and the weight that the clip norm is chosen for."""

    a: np.ndarray
    g: np.ndarray
    weight: np.ndarray
    how: Product


def _single(a: list[list[float]], g: list[list[float]], how: Product, weight: float | None = None) -> Example:
    left, right = (rounded(np.array([rows], np.float64), how.core.bits) for rows in (a, g))
    wanted = aimed(right, np.array([0.7]), how.core) if weight is None else np.array([weight])
    return Example(left, right, wanted, how)


def _rounded_up() -> Example:
    """The folded weight rounds g up by half a unit in the last place."""
    return _single([[1.0]], [[1.25]], Product(A100))


def _rounded_up_in_tf32() -> Example:
    return _single([[1.0]], [[1.25]], Product(A100_TF32))


def _long_rows() -> Example:
    """The row's square loses all but the first entry's, and the folded weight rounds g up."""
    return _single([[1.0, *[2.0**-12 * 1.375] * 4000]], [[1.25]], Product(V100))


def _long_product() -> Example:
    """The sum loses all rows but the first, which the others should make smaller."""
    return _single([[1.0]] * 1500, [[1.25], *[[-1.09375 * 2.0**-24]] * 1499], Product(A100_TF32))


def _square_of_zero() -> Example:
    """The square of the left factor is 0, the product with the right one is not."""
    return _single([[2.0**-76, 0], [0, 1]], [[2.0**60], [2.0**-20]], Product(A100), 1.0)


def _one_weight_lost() -> Example:
    """Two rows cancel, but of the weighted ones one is below the smallest number."""
    rows = [[2.0**-38], [-(2.0**-38) * (1 - 2.0**-7)]]
    return _single([[2.0**10]] * 2, rows, Product(A100, flush=True), 2.0**-88 * (1 + 2.0**-9))


def _one_result_lost() -> Example:
    """Two rows cancel, but the product of one is below the smallest number."""
    rows = [[2.0**-40], [-(2.0**-40) * (1 - 2.0**-8)]]
    return _single([[2.0**-20]] * 2, rows, Product(A100, flush=True), 2.0**-66)


HALF_UNITS = {"bfloat16": 2.0**-9, "tf32": 2.0**-12}
gamma, contribution_bound = tensor_cores.gamma, tensor_cores.contribution_bound


def _no_accumulation(found: tensor_cores.Terms, *arguments: Any) -> Factors:
    return contribution_bound(found._replace(magnitudes=0 * found.magnitudes), *arguments)


MUTANTS: dict[str, tuple[str, Any, Callable[[], Example]]] = {
    "no gamma": ("gamma", lambda terms: 0.0, _long_rows),
    "a quarter of gamma": ("gamma", lambda terms: gamma(terms) / 4, _long_rows),
    "no accumulation": ("contribution_bound", _no_accumulation, _long_product),
    "no fold": ("UNIT_ROUNDOFF", {"bfloat16": 0.0, "tf32": 0.0}, _rounded_up),
    "half the fold in bfloat16": ("UNIT_ROUNDOFF", HALF_UNITS, _rounded_up),
    "half the fold in TF32": ("UNIT_ROUNDOFF", HALF_UNITS, _rounded_up_in_tf32),
    "no underflow of squares": ("FLOOR", 0.0, _square_of_zero),
    "no underflow of weights": ("TINY", 0.0, _one_weight_lost),
    "no underflow of results": ("underflow", lambda terms: 0.0, _one_result_lost),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_part_of_the_bound_is_needed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, built = MUTANTS[mutant]
    example = built()
    assert over_clip(*example) <= 1
    monkeypatch.setattr(tensor_cores, name, value)
    assert over_clip(*example) > 1


def test_the_bound_holds_where_all_products_are_as_wrong_as_they_may_be() -> None:
    """Ten equal rows of norm 1: the gradient's norm is 10."""
    width, ones = 4096, np.ones((1, 10))
    products = np.full((1, 10, 10), 1 - gamma(width))
    found = tensor_cores.terms_of(products, products, (ones, ones), (ones, ones), width, width)
    assert 10 <= tensor_cores.norm_bound(found)[0] < 10 * (1 + 1e-11)
    assert 100 <= found.left[0] < 100 * (1 + 1e-11)
    assert 10 <= np.sqrt(found.magnitudes[0]) < 10 * (1 + 1e-11)
    assert 1 <= tensor_cores.row_norms(products, width).min() <= 1 + 2.0**-39


def test_long_rows_are_taken_in_pieces() -> None:
    assert tensor_cores.row_norms(np.ones(1), tensor_cores.LONGEST + 1)[0] < 1 + gamma(tensor_cores.PIECE)


@pytest.mark.parametrize("core", CORES[1:], ids=lambda core: core.name)
def test_ordinary_examples_reach_99_percent_of_clip_norm(core: Core) -> None:
    """A ViT's shape: rows with a mean, as of activations, and gradients at outputs with a smaller one."""
    random = np.random.default_rng(0)
    a = rounded(random.normal(size=(2, 197, 96)) + random.normal(size=(2, 1, 96)), core.bits)
    g = rounded(1e-3 * (random.normal(size=(2, 197, 96)) + 0.5 * random.normal(size=(2, 1, 96))), core.bits)
    assert over_clip(a, g, np.full(2, 0.3), Product(core)).min() > 0.99


def test_a_second_piece_wins_back_what_the_fold_costs() -> None:
    """Rows without a mean cancel more, and the fold in bfloat16 alone costs more than 1%."""
    random = np.random.default_rng(0)
    a, g = (rounded(random.normal(size=(2, 197, 96)), A100.bits) for _ in range(2))
    one, two = (over_clip(a, g, np.full(2, 0.3), Product(A100, pieces=pieces)) for pieces in (1, 2))
    assert one.max() < 0.985
    assert two.min() > 0.995


def test_blocks_of_rows_add_up_to_the_whole() -> None:
    random = np.random.default_rng(0)
    a, g = (rounded(random.normal(size=(3, 12, width)), A100.bits) for width in (5, 7))
    P, Q = inner_products(a, A100), inner_products(g, A100)
    norms = [tensor_cores.row_norms(np.diagonal(x, axis1=1, axis2=2), width) for x, width in ((P, 5), (Q, 7))]

    def block(i: slice, j: slice) -> tensor_cores.Terms:
        pairs = [(each[:, i], each[:, j]) for each in norms]
        return tensor_cores.terms_of(P[:, i, j], Q[:, i, j], *pairs, 5, 7)

    first, second = slice(0, 4), slice(4, 12)
    mixed = block(first, second)
    parts = block(first, first) + block(second, second) + mixed + mixed
    for found, expected in zip(parts, terms(a, g, A100), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7)  # the allowance for float64 depends on the sizes


def test_jax_and_numpy_give_one_bound() -> None:
    random = np.random.default_rng(0)
    a, g = (rounded(random.normal(size=(3, 12, 5)), A100.bits) for _ in range(2))
    P, Q = (inner_products(x, A100).astype(np.float32) for x in (a, g))

    @jax.vmap
    def bound(P: jax.Array, Q: jax.Array) -> Factors:
        norms = [(tensor_cores.row_norms(jnp.diagonal(x), 5),) * 2 for x in (P, Q)]
        return tensor_cores.contribution_bound(tensor_cores.terms_of(P, Q, *norms, 5, 5), 2.0**-8, 12, 5, 25)

    found = jax.jit(bound)(P, Q)
    assert {x.dtype for x in found} == {np.dtype("float64")}
    for each, expected in zip(found, bounds_of(a, g, Product(A100)), strict=True):
        np.testing.assert_allclose(each, expected, rtol=1e-12)


def test_one_hot_rows_cost_no_error_of_their_products() -> None:
    """Of one row, only the fold's and the right factor's errors are left."""
    rows = np.ones((1, 1, 1))
    g = rounded(np.random.default_rng(0).normal(size=(1, 1, 4000)), A100.bits)
    Q = g @ g.swapaxes(1, 2)
    right = tensor_cores.row_norms(Q[:, 0], 4000)
    exact, bounded = (
        tensor_cores.norm_bound(tensor_cores.terms_of(rows, Q, (rows[0],) * 2, (right,) * 2, 4000, 4000, is_exact))
        for is_exact in (True, False)
    )
    norm, lost = np.linalg.norm(g), gamma(4000)
    assert norm * (1 + 0.4 * lost) < exact < norm * (1 + 0.6 * lost)
    assert norm * (1 + 0.9 * lost) < bounded < norm * (1 + 1.1 * lost)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_products_that_are_not_finite_give_no_finite_bound(value: float) -> None:
    Q = np.full((1, 1, 1), value)
    norms = tensor_cores.row_norms(Q[:, 0], 1)
    one = np.ones((1, 1))
    for P in (np.zeros((1, 1, 1)), np.ones((1, 1, 1))):
        with np.errstate(invalid="ignore"):
            found = tensor_cores.terms_of(P, Q, (one, one), (norms, norms), 1, 1)
            assert not np.isfinite(contribution_bound(found, 2.0**-8, 1, 1, 1)[0]).any()


def test_a_product_too_long_for_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller physical batch"):
        tensor_cores.gamma(2**22)
