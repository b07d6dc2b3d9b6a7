"""How the norm of each parameter's gradient is had: from the factors (`ghost`), or from the gradient (`instantiate`).

Both are exact. Ghost costs 2 t^2 (m + n) operations for a gradient [m, n] over t positions and keeps nothing;
instantiating costs no operation that plain training would not make, but writes the gradient of every example and reads
it twice. Which is cheaper depends on the rates: see `DeviceRates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from dpdist.mechanism.clipping.factors import Factors, factors_of
from dpdist.mechanism.clipping.graph import Graph
from dpdist.mechanism.clipping.paths import matching, paths_of
from dpdist.mechanism.clipping.view import disjoint

Strategy = Literal["ghost", "instantiate"]
STRATEGIES: tuple[Strategy, ...] = ("ghost", "instantiate")


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What a device does in a second; only the ratio matters for a choice."""

    #: Floating-point operations of a float64 matrix product.
    flops_float64: float
    #: Bytes read from or written to the device's memory.
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class LeafStrategy:
    """What is known of one parameter before anything is computed."""

    path: str
    shape: tuple[int, ...]
    strategy: Strategy
    #: Uses whose factors add up (each list), to be told from the others by the regions of the parameter they see.
    groups: tuple[tuple[int, ...], ...]
    #: Why `ghost` is not possible; empty where it is.
    reason: str
    #: Estimated seconds per example of either; 0 where the strategy was not chosen by cost.
    seconds: tuple[tuple[str, float], ...] = ()


Choose = Callable[[Sequence[Sequence[Factors]]], tuple[Strategy, dict[str, float]]]


def smaller(groups: Sequence[Sequence[Factors]]) -> tuple[Strategy, dict[str, float]]:
    """The strategy that needs less memory, 2 t^2 numbers or m n (Bu et al. 2022, arXiv 2205.10683, section 4)."""
    ghost = sum(2 * _length(group) ** 2 * group[0].groups for group in groups)
    gradient = sum(_size(group[0]) for group in groups)
    return ("ghost" if ghost < gradient else "instantiate"), {}


def cheaper(rates: DeviceRates) -> Choose:
    """The strategy that takes less time on `rates`, by a roofline: operations and bytes, each over their rate."""

    def choose(groups: Sequence[Sequence[Factors]]) -> tuple[Strategy, dict[str, float]]:
        ghost = instantiate = 0.0
        for group in groups:
            t, f = _length(group), group[0]
            wide = (0 if f.one_hot else f.m) + f.n
            inner = t * (t + 1) * wide * f.groups
            # Both factors are converted to float64, and the two [t, t] products written and read.
            moved = 12 * t * wide * f.groups + 32 * t * t * f.groups
            ghost += inner / rates.flops_float64 + moved / rates.bandwidth
            # The weighted sum of ghost is the product that instantiating makes anyway.
            instantiate += 12 * _size(f) / rates.bandwidth
        return ("ghost" if ghost < instantiate else "instantiate"), {"ghost": ghost, "instantiate": instantiate}

    return choose


def plan_leaves(
    graph: Graph, params: Any, choose: Choose, overrides: Mapping[str, str]
) -> tuple[list[LeafStrategy], list[Factors | None]]:
    """The plan of every leaf, and the factors of every use.

    Args:
        overrides: strategy by path pattern (`fnmatch`); the first that matches wins. A parameter that has no factors is
            instantiated whatever they say.

    Raises:
        ValueError: an unknown strategy, or a pattern that matches no parameter.
    """
    factors = [factors_of(graph, use) for use in graph.uses]
    for pattern, asked in overrides.items():
        if asked not in STRATEGIES:
            raise ValueError(f"{pattern}: unknown strategy {asked!r}; there are {' and '.join(STRATEGIES)}")
        matching(params, [pattern])
    plans = []
    for number, path in enumerate(paths_of(params)):
        shape = tuple(graph.aval(graph.params[number]).shape)
        mine = [u for u, use in enumerate(graph.uses) if number in use.leaves]
        groups, reason = _groups(mine, factors, graph)
        strategy: Strategy = "instantiate"
        seconds: dict[str, float] = {}
        if not reason:
            strategy, seconds = choose([[f for u in group if (f := factors[u]) is not None] for group in groups])
            asked = next((s for pattern, s in overrides.items() if fnmatchcase(path, pattern)), strategy)
            strategy = "ghost" if asked == "ghost" else "instantiate"
        plans.append(
            LeafStrategy(
                path=path,
                shape=shape,
                strategy=strategy,
                groups=groups,
                reason=reason,
                seconds=tuple(seconds.items()),
            )
        )
    return plans, factors


def _groups(
    uses: Sequence[int], factors: Sequence[Factors | None], graph: Graph
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Uses by the region of the parameter that they see, or why its norm is not a matter of factors."""
    if not uses:
        return (), "no example's loss depends on it"
    without = sorted({graph.uses[u].node.name for u in uses if factors[u] is None})
    if without:
        return (), f"it meets data in {', '.join(without)}"
    groups: dict[Any, list[int]] = {}
    for u in uses:
        if (found := factors[u]) is not None:
            groups.setdefault(found.view.region, []).append(u)
    regions = list(groups)
    if not all(disjoint(a, b) for i, a in enumerate(regions) for b in regions[i + 1 :]):
        return (), "it is used in parts that overlap"
    for group in groups.values():
        if len(group) > 1 and not _add_up([f for u in group if (f := factors[u]) is not None]):
            return (), "its uses divide it into rows and columns differently"
    return tuple(tuple(group) for group in groups.values()), ""


def sides_swapped(first: Factors, other: Factors) -> bool | None:
    """Whether left and right change places to make `other` a product like `first`; None where neither way does."""
    a, b = _axes(first), _axes(other)
    if a is None or b is None or a[2] != b[2]:
        return None
    if (a[0], a[1]) == (b[0], b[1]):
        return False
    return True if (a[0], a[1]) == (b[1], b[0]) else None


def _add_up(group: Sequence[Factors]) -> bool:
    return all(sides_swapped(group[0], other) is not None for other in group) and (
        group[0].groups == 1 or not any(factors.one_hot for factors in group)
    )


def _axes(factors: Factors) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Axes of the leaf, those of size 1 left out, that run over left's columns, right's columns and the groups."""
    seen = factors.view.axes
    if seen is None:
        return None
    left, right, groups = (
        tuple(axis for i in axes if (axis := seen[i]) is not None)
        for axes in (factors.left_axes, factors.right_axes, factors.group_axes)
    )
    return left, right, groups


def _length(group: Sequence[Factors]) -> int:
    return sum(factors.length for factors in group)


def _size(factors: Factors) -> int:
    return factors.groups * factors.m * factors.n
