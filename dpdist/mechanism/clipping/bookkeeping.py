"""Clipped gradient sums in one forward and one backward pass, for any loss (Bu et al. 2023, arXiv 2210.00038).

We add a shift of zero to the output of every use of a parameter and differentiate with respect to these shifts alone.
The resulting gradients at the outputs are all that norms and weighted sums need. The gradient of one example with
respect to a parameter is computed only where that is the cheaper way to its norm (strategy `instantiate`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from dpdist.mechanism.clipping.factors import Factors
from dpdist.mechanism.clipping.flatten import call, shape_of
from dpdist.mechanism.clipping.graph import Graph, Use, Values, read, trace
from dpdist.mechanism.clipping.norms import Product, Side, squared_norm
from dpdist.mechanism.clipping.paths import trainable
from dpdist.mechanism.clipping.per_example import per_example_grad_sum
from dpdist.mechanism.clipping.separate import UnsupportedLossError, for_each
from dpdist.mechanism.clipping.strategy import LeafStrategy, length_of, sides_swapped, size_of
from dpdist.mechanism.clipping.tensor_cores import UNIT_ROUNDOFF, contribution_bound
from dpdist.mechanism.clipping.tensor_products import Format, changes, folded, product, roundings, terms_of_products
from dpdist.mechanism.clipping.weights import (
    Norms,
    is_short,
    norms_of,
    norms_of_gradients,
    rounded_float32,
    weigh,
    weighted_sum,
)

#: (graph, params) -> (the strategy of every leaf, the factors of every use); see `strategy.strategies_of`.
ChooseStrategies = Callable[[Graph, Any], tuple[list[LeafStrategy], list[Factors | None]]]
#: What JAX raises for a primitive without a derivative rule, for a wrong rule of the user's, and for a while loop.
REFUSALS = (NotImplementedError, TypeError, ValueError)


class NoDerivativeError(Exception):
    """JAX could not differentiate; its own error is the `__cause__`."""


@contextmanager
def deriving() -> Iterator[None]:
    """Turn JAX's errors into NoDerivativeError: wrap only JAX's differentiation of user code, so that our bugs show."""
    try:
        yield
    except UnsupportedLossError:
        raise
    except REFUSALS as error:
        raise NoDerivativeError(str(error)) from error


def bookkeeping_grad_sum(
    loss_fn: Callable[[Any, Any], Any],
    clip_norm: float,
    choose: ChooseStrategies,
    *,
    two_passes: bool,
    tensor: bool = False,
    frozen: Collection[str] = frozenset(),
) -> Callable[[Any, Any, Any], tuple[Any, Float32[Array, " p"]]]:
    """Make the function that `clipped_grad_sum` describes.

    Args:
        choose: decides the strategy of every leaf.
        two_passes: run forward and backward once for the norms and once more for the sum, as ghost clipping does
            (Li et al. 2022, arXiv 2110.05679): slower, but no gradient at an output is stored in between. A loss that
            computes in a format shorter than float32, and `tensor`, get one pass.
        tensor: compute norms and sums from factors on tensor cores: see `tensor_products`.
    """

    def clipped_sum(params: Any, batch: Any, mask: Float[Array | np.ndarray, " p"]) -> tuple[Any, Float32[Array, " p"]]:
        params, batch, mask = jax.tree.map(jnp.asarray, (params, batch, mask))
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        graph = trace(loss_fn, params, example, frozen)
        strategies, factors = choose(graph, params)
        leaves, structure = jax.tree.flatten(params)
        run_once = partial(_Pass, graph, strategies, factors, leaves, mask.shape[0], tensor)
        try:
            first = second = run_once(jax.tree.leaves(batch))
            norms = first.norms()
            scale, used = weigh(norms, mask, clip_norm, first.rows)
            # What is rounded to a short format may differ by a unit in its last place between two passes that XLA
            # compiles differently, far more than the norm's margin: then the sum is that of the pass of the norms.
            if two_passes and not first.short:
                # No weight is ever NaN, but XLA cannot prove it and so cannot merge the two passes into one. (An
                # optimization barrier would not do: XLA drops it.)
                never = jnp.isnan(scale).any()
                second = run_once([jnp.where(never, jnp.zeros_like(x), x) for x in jax.tree.leaves(batch)])
            sums = jax.tree.unflatten(structure, second.weighted(scale, used))
            return trainable(sums, frozen), norms_of(norms.computed)
        except NoDerivativeError as error:
            # JAX may be able to differentiate the loss itself, if not with shifts: they need one more derivative where
            # an equation that is not inlined stops the gradient inside.
            found = per_example_grad_sum(loss_fn, clip_norm=clip_norm, frozen=frozen)(params, batch, mask)
            warnings.warn(f"clipping falls back to the slower method per_example: {error}", stacklevel=1)
            return found

    return clipped_sum


class _Instantiated(NamedTuple):
    """Every example's gradient of one leaf, in the layout it was computed in, and the map to the leaf's layout."""

    gradients: Float32[Array, "p ..."]
    to_leaf: Callable[[Array], Array]


class _Pass:
    """One forward and one backward pass over a batch of p examples; gives their norms and weighted sums."""

    def __init__(
        self,
        graph: Graph,
        strategies: Sequence[LeafStrategy],
        factors: Sequence[Factors | None],
        leaves: Sequence[Array],
        examples: int,
        tensor: bool,
        batch: Sequence[Array],
    ) -> None:
        self._graph, self._strategies, self._leaves = graph, strategies, leaves
        self._examples, self._tensor = examples, tensor
        #: By use; a use without factors is instantiated through its derivative.
        self._factors = {u: each for u, each in enumerate(factors) if each is not None}
        ghosts = {u for group in self.ghosts for u in group}
        self._rounding = roundings(graph, self._factors, ghosts, tensor)
        settle = changes(graph, self._factors, self._rounding)
        self._shared = graph.compute_params(leaves)
        zero = jnp.zeros_like(shape_of(graph.example[-1]))  # see `trace`
        shifts = [[jnp.zeros_like(shape_of(use.equation.outvars[j])) for j in use.outputs] for use in graph.uses]

        def one_example(*columns: Array) -> tuple[Any, Any]:
            def loss(shifts: Any) -> tuple[Array, Any]:
                return graph.compute_loss(self._shared, (*columns, zero), shifts, settle)

            # Not jax.grad, which rejects the complex values of a Fourier transform.
            value, back, operands = jax.vjp(loss, shifts, has_aux=True)
            return back(jnp.ones_like(value))[0], operands

        #: For every use, the gradients at its outputs and its equation's data-derived inputs, with leading axis p.
        with deriving():
            self._at_outputs, self._operands = for_each(one_example, examples, *batch)
        self._order()
        self._instantiated = self._instantiate()

    @property
    def short(self) -> bool:
        """Whether a factor, or a gradient at an output, is in a format shorter than float32."""
        return self._tensor or any(is_short(leaf.dtype) for leaf in jax.tree.leaves((self._at_outputs, self._operands)))

    @cached_property
    def ghosts(self) -> list[tuple[int, ...]]:
        """The groups of uses whose gradients are not stored."""
        return [group for leaf in self._strategies if leaf.strategy == "ghost" for group in leaf.groups]

    @property
    def rows(self) -> int:
        """The most rows of one example in a weighted sum."""
        return max((self._factors[u].length for group in self.ghosts for u in group), default=1)

    def norms(self) -> Norms:
        """Return the norms of all examples' gradients, and bounds that cover the rounding of the weighted sum."""
        stored = [each.gradients for each in self._instantiated.values()]
        return reduce(add, map(self._group_norms, self.ghosts), norms_of_gradients(stored, self._examples))

    def weighted(self, scale: Float32[Array, " p"], used: Bool[Array, " p"]) -> list[Float32[Array, "..."]]:
        """Return, for every leaf, sum_i scale[i] g_i over the examples with used[i]."""
        sums = []
        for number, leaf in enumerate(self._strategies):
            if number in self._instantiated:
                instantiated = self._instantiated[number]
                sums.append(instantiated.to_leaf(weighted_sum(scale, used, instantiated.gradients)))
                continue
            of_uses = (self._weighted_use(u, scale, used) for group in leaf.groups for u in group)
            sums.append(sum(of_uses, jnp.zeros(leaf.shape, jnp.float32)))
        return sums

    def _weighted_use(self, u: int, scale: Float32[Array, " p"], used: Bool[Array, " p"]) -> Float32[Array, "..."]:
        factors, fmt = self._factors[u], self._rounding[u].fmt
        left, right = self._rows(u)
        if factors.one_hot:
            rows = jnp.where(used[:, None], left, -1).reshape(-1)
            found = _product(factors, rows, folded(scale, used, right, "float32").reshape(1, -1, factors.n), "float32")
        else:
            sides, folds = [left, right], 0 if fmt != "float32" and factors.weighted_left else 1
            if not self._rounding[u].finite:
                sides = [jnp.where(used[:, None, None, None], side, 0) for side in sides]
            sides[folds] = folded(scale, used, (left, right)[folds], fmt)
            found = product("pgtm,pgtn->gmn", sides[0], sides[1], fmt)
        return _to_leaf(factors, factors.arrange(found))

    def _order(self) -> None:
        """Let A wait for a G: XLA would compute A A^T in the forward pass, and keep it until there is a G G^T."""
        waiting: dict[Any, Array] = {}
        for u, rounding in self._rounding.items():
            if rounding.finite and rounding.operand and rounding.output:
                data, operands = self._factors[u].data, self._operands[u]
                if data not in waiting:
                    both = operands[self._factors[u].operand], self._at_outputs[u][0]
                    waiting[data], self._at_outputs[u][0] = lax.optimization_barrier(both)
                operands[self._factors[u].operand] = waiting[data]

    def _rows(self, u: int) -> tuple[Array, Array]:
        """Return the left and right factor of use `u`, with leading axis p."""
        factors, rounding = self._factors[u], self._rounding[u]
        left, right = self._operands[u][factors.operand], self._at_outputs[u][0]
        left = left if factors.one_hot or rounding.operand else rounding.copy(left)
        right = right if rounding.output else rounding.copy(right)
        return jax.vmap(factors.left)(left), jax.vmap(factors.right)(right)

    def _group_norms(self, group: Sequence[int]) -> Norms:
        """Return the norms of the summed gradients of all uses in a group."""
        uses = [u for u in group if u in self._factors]
        factors, fmt = [self._factors[u] for u in uses], self._rounding[uses[0]].fmt
        bound = partial(_bounds_in_float64, factors) if fmt == "float32" else partial(_bounds_in, fmt, factors)

        def one_example(rows: list[tuple[Array, Array]]) -> Norms:
            products = []
            for each, (left, right) in zip(factors, rows, strict=True):
                sides = Side(left, each.one_hot), Side(right, False)
                swapped = len(factors) > 1 and bool(sides_swapped(factors[0], each))
                weighted_left = fmt != "float32" and each.weighted_left
                products.append(Product(*(sides[::-1] if swapped else sides), swapped != weighted_left))
            return bound(products)

        return jax.vmap(one_example)([self._rows(u) for u in uses])

    def _instantiate(self) -> dict[int, _Instantiated]:
        """Compute the gradient of every example, by leaf number, for the leaves whose strategy is `instantiate`."""
        wanted = [n for n, leaf in enumerate(self._strategies) if leaf.strategy == "instantiate"]
        found: dict[int, list[_Instantiated]] = {n: [] for n in wanted}
        pending: Values = {}
        for u, use in enumerate(self._graph.uses):
            if use.leaves.isdisjoint(wanted):
                continue
            if u in self._factors:
                factors = self._factors[u]
                gradient = jax.vmap(partial(_product, factors, fmt=self._rounding[u].fmt))(*self._rows(u))
                if factors.view is not None:
                    found[factors.view.leaf].append(_Instantiated(gradient, partial(_leaf_of, factors)))
                    continue
                operand = use.equation.invars[use.operands[0]]
                at_operand = jax.vmap(partial(_operand_of, factors))(gradient)
                at_operands = [(operand, at_operand.astype(shape_of(operand).dtype))]
            else:
                at_operands = self._at_operands(use, u)
            for variable, gradient in at_operands:
                pending[variable] = pending[variable] + gradient if variable in pending else gradient
        for leaf, gradient in self._back_to_leaves(pending, wanted).items():
            found[leaf].append(_Instantiated(gradient, lambda x: x))
        return {n: self._sum_of_uses(n, parts) for n, parts in found.items()}

    def _sum_of_uses(self, leaf: int, parts: Sequence[_Instantiated]) -> _Instantiated:
        """Add up the gradients of one leaf from its several uses."""
        if len(parts) == 1:
            return parts[0]
        zeros = jnp.zeros((self._examples, *self._strategies[leaf].shape), jnp.float32)
        return _Instantiated(sum((jax.vmap(part.to_leaf)(part.gradients) for part in parts), zeros), lambda x: x)

    def _at_operands(self, use: Use, u: int) -> list[tuple[Any, Array]]:
        """Compute every example's gradient at the parameter operands of a use, by the primitive's own derivative."""
        equation, mine = use.equation, [self._shared[use.equation.invars[i]] for i in use.operands]

        def one_example(operands: list[Any], at_outputs: Sequence[Array]) -> list[Array]:
            def outputs(*values: Array) -> list[Array]:
                of_data = {v: x for v, x in zip(equation.invars, operands, strict=True) if x is not None}
                inputs = read(equation.invars, self._shared | of_data)
                for position, value in zip(use.operands, values, strict=True):
                    inputs[position] = value
                results = call(equation, inputs)
                return [results[j] for j in use.outputs]

            return list(jax.vjp(outputs, *mine)[1](list(at_outputs)))

        with deriving():
            found = for_each(one_example, self._examples, self._operands[u], self._at_outputs[u])
        return [(equation.invars[i], gradient) for i, gradient in zip(use.operands, found, strict=True)]

    def _back_to_leaves(self, pending: Values, wanted: Sequence[int]) -> dict[int, Array]:
        """Carry gradients at parameter-derived values back to the leaves in `wanted`."""
        reached = [n for n in wanted if any(n in self._graph.origins[variable].leaves for variable in pending)]
        if not reached:
            return {}

        def derived(*chosen: Array) -> list[Array]:
            leaves = list(self._leaves)
            for n, leaf in zip(reached, chosen, strict=True):
                leaves[n] = leaf
            return read(pending, self._graph.compute_params(leaves))

        with deriving():
            _, back = jax.vjp(derived, *(self._leaves[n] for n in reached))
            # Rounded while still short: back at a float32 leaf, the cast to it would be half of a pair that XLA drops.
            short = [rounded_float32(gradient).astype(gradient.dtype) for gradient in pending.values()]
            found = for_each(back, self._examples, short)
        return {n: rounded_float32(gradient) for n, gradient in zip(reached, found, strict=True)}


def _bounds_in_float64(factors: Sequence[Factors], products: Sequence[Product]) -> Norms:
    """Return the norms of one example's gradient that is summed in float32."""
    square, terms = squared_norm(products)
    # The weighted sum is a float32 product, rounded differently from the norm: over n terms, two more for the weight
    # and the sum of uses, its error is at most n u / (1 - n u) times the sum of their magnitudes, with u = 2^-24
    # (Higham 2002, section 3.5).
    lost = 2.0**-24 * (length_of(factors) + 2)
    with jax.enable_x64(True):
        relative = jnp.square(jnp.sqrt(square) + lost / (1 - lost) * terms)
        return Norms(square, relative, jnp.float64(0), jnp.square(terms))


def _bounds_in(fmt: Format, factors: Sequence[Factors], products: Sequence[Product]) -> Norms:
    """Return the norms of one example's gradient that is summed on tensor cores."""
    terms = terms_of_products(products)
    u = 0.0 if all(each.one_hot for each in factors) else UNIT_ROUNDOFF[fmt]
    contracted, n = length_of(factors), max(max(each.m, each.n) for each in factors)
    relative, absolute = contribution_bound(terms, u, contracted, n, size_of(factors[0]))
    with jax.enable_x64(True):
        squared = jnp.maximum(terms.square, 0), jnp.square(relative), jnp.square(absolute), terms.magnitudes
        return Norms(*map(jnp.asarray, squared))


def _product(factors: Factors, left: Array, right: Array, fmt: Format) -> Float32[Array, "groups rows columns"]:
    """Compute sum_t left^T right of one example, transposed if m > n: a CPU's product is faster into long rows.

    Args:
        left: [groups, t, m], or integers [t] where it is one-hot.
        right: [groups, t, n].
    """
    if factors.one_hot:
        # Row -1 means no row. Indexing would count it from the end, so move it out of range, where `drop` ignores it.
        rows = jnp.where(left >= 0, left, factors.m)
        zeros = jnp.zeros((1, factors.m, factors.n), jnp.float32)
        return zeros.at[0, rows].add(right[0].astype(jnp.float32), mode="drop")
    order = "gtm,gtn->gnm" if _transposed(factors) else "gtm,gtn->gmn"
    return product(order, left, right, fmt)


def _transposed(factors: Factors) -> bool:
    return factors.m > factors.n and not factors.one_hot


def _operand_of(factors: Factors, product: Float32[Array, "groups rows columns"]) -> Float32[Array, "..."]:
    """Turn a result of `_product`, or a sum of such results, into the gradient of the use's operand."""
    return factors.arrange(jnp.swapaxes(product, 1, 2) if _transposed(factors) else product)


def _leaf_of(factors: Factors, product: Float32[Array, "groups rows columns"]) -> Float32[Array, "..."]:
    """Turn a result of `_product`, or a sum of such results, into the gradient of the leaf."""
    return _to_leaf(factors, _operand_of(factors, product))


def _to_leaf(factors: Factors, gradient: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Turn the gradient of an operand that is a view of a leaf into the gradient of the leaf."""
    assert factors.view is not None
    return factors.view.to_leaf(gradient)
