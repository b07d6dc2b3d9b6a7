"""Choose how each parameter's gradient norm is computed: from factors (`ghost`) or from the gradient (`instantiate`).

Both are exact. `ghost` costs up to 2 t^2 (m + n) operations for a gradient [m, n] over t positions and stores nothing.
`instantiate` costs no operation beyond those of plain training, but writes the gradient of every example to memory and
reads it twice. Which is faster depends on the device: see `program.device_rates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, Literal

from dpdist.mechanism.clipping.factors import Factors, factors_of
from dpdist.mechanism.clipping.flatten import shape_of
from dpdist.mechanism.clipping.graph import Graph
from dpdist.mechanism.clipping.paths import matching, paths_of
from dpdist.mechanism.clipping.view import disjoint

Strategy = Literal["ghost", "instantiate"]
STRATEGIES: tuple[Strategy, ...] = ("ghost", "instantiate")


@dataclass(frozen=True)
class LeafStrategy:
    """How the gradient norm of one parameter is computed."""

    path: str
    shape: tuple[int, ...]
    strategy: Strategy
    #: The parameter's uses by number. One group holds the uses that see the same region of the parameter, so that their
    #: gradients add up; different groups see disjoint regions, so that their squared norms add up.
    groups: tuple[tuple[int, ...], ...]
    #: Why `ghost` is not possible; empty where it is.
    reason: str
    #: (strategy, estimated seconds per example) of both; empty where the choice was not made by time.
    seconds: tuple[tuple[str, float], ...] = ()


#: The `reason` of a parameter whose gradient is 0 whatever the example.
UNUSED = "no example's loss depends on it"
#: The factors of one parameter, by group -> (the preferred strategy, estimated seconds per example of each if known).
Preference = Callable[[Sequence[Sequence[Factors]]], tuple[Strategy, dict[str, float]]]


def smaller(groups: Sequence[Sequence[Factors]]) -> tuple[Strategy, dict[str, float]]:
    """Prefer the strategy with less memory, 2 t^2 or m n numbers (Bu et al. 2022, arXiv 2205.10683, section 4)."""
    ghost = sum(2 * length_of(group) ** 2 * group[0].groups for group in groups)
    gradient = sum(size_of(group[0]) for group in groups)
    return ("ghost" if ghost < gradient else "instantiate"), {}


def strategies_of(
    graph: Graph, params: Any, prefer: Preference, overrides: Mapping[str, str]
) -> tuple[list[LeafStrategy], list[Factors | None]]:
    """Choose the strategy of every leaf; returns these and the factors of every use.

    Args:
        overrides: strategy by path pattern (`fnmatch`); the first that matches wins over `prefer`. A parameter for
            which `ghost` is not possible is instantiated regardless.

    Raises:
        ValueError: an unknown strategy, or a pattern that matches no parameter.
    """
    factors = [factors_of(graph, use) for use in graph.uses]
    for pattern, asked in overrides.items():
        if asked not in STRATEGIES:
            raise ValueError(f"{pattern}: unknown strategy {asked!r}; there are {' and '.join(STRATEGIES)}")
        matching(params, [pattern])
    strategies = []
    for number, path in enumerate(paths_of(params)):
        shape = shape_of(graph.params[number]).shape
        own_uses = [u for u, use in enumerate(graph.uses) if number in use.leaves]
        groups, reason = _groups(own_uses, factors, graph)
        strategy: Strategy = "instantiate"
        seconds: dict[str, float] = {}
        if not reason:
            strategy, seconds = prefer([[f for u in group if (f := factors[u]) is not None] for group in groups])
            asked = next((s for pattern, s in overrides.items() if fnmatchcase(path, pattern)), strategy)
            strategy = "ghost" if asked == "ghost" else "instantiate"
        strategies.append(LeafStrategy(path, shape, strategy, groups, reason, tuple(seconds.items())))
    return strategies, factors


def _groups(
    uses: Sequence[int], factors: Sequence[Factors | None], graph: Graph
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Group a parameter's uses by the region of it that they see; if `ghost` is impossible, return why instead."""
    if not uses:
        return (), UNUSED
    seen = {u: found.view for u in uses if (found := factors[u]) is not None and found.view is not None}
    if not_seen := sorted({graph.uses[u].equation.primitive.name for u in uses if u not in seen}):
        return (), f"no ghost norm for its use in {', '.join(not_seen)}"
    groups: dict[Any, list[int]] = {}
    for u, view in seen.items():
        groups.setdefault(view.region, []).append(u)
    if not all(disjoint(a, b) for a, b in combinations(groups, 2)):
        return (), "it is used in parts that overlap"
    if not all(_add_up([f for u in g if (f := factors[u]) is not None]) for g in groups.values() if len(g) > 1):
        return (), "its uses divide it into rows and columns differently"
    return tuple(tuple(group) for group in groups.values()), ""


def sides_swapped(first: Factors, other: Factors) -> bool | None:
    """Return whether swapping left and right makes `other` a product like `first`; None if neither order does.

    A convolution's groups are a division of its features, so equal axes do not make their numbers equal.
    """
    a, b = _axes(first), _axes(other)
    if a is None or b is None or a[2] != b[2] or first.groups != other.groups:
        return None
    if (a[0], a[1]) == (b[0], b[1]):
        return False
    # Features are divided into groups, so transposed they are divided differently.
    divided = first.groups > 1 and not first.axes[2]
    return True if (a[0], a[1]) == (b[1], b[0]) and not divided else None


def _add_up(group: Sequence[Factors]) -> bool:
    """True if the factors of a group's uses can be concatenated into one sum of outer products."""
    return all(sides_swapped(group[0], other) is not None for other in group) and (
        group[0].groups == 1 or not any(factors.one_hot for factors in group)
    )


def _axes(factors: Factors) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Return the leaf's axes that make up left's columns, right's columns and the groups, without those of size 1."""
    of_leaf = None if factors.view is None else factors.view.axes
    if of_leaf is None:
        return None
    left, right, groups = (tuple(axis for i in axes if (axis := of_leaf[i]) is not None) for axes in factors.axes)
    return left, right, groups


def length_of(group: Sequence[Factors]) -> int:
    """Return the number of positions t of a group's uses together."""
    return sum(factors.length for factors in group)


def size_of(factors: Factors) -> int:
    """Return the number of entries of the gradient of one use."""
    return factors.groups * factors.m * factors.n
