"""Parameters by path, such as `layers/0/kernel`, and the split into those that train and those that stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax


def paths_of(params: Any) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


def matching(params: Any, patterns: Iterable[str]) -> frozenset[str]:
    """Paths that match at least one pattern; `*` stands for anything, slashes too.

    Raises:
        ValueError: a pattern matches nothing.
    """
    paths, matched = paths_of(params), set()
    for pattern in patterns:
        found = {path for path in paths if fnmatchcase(path, pattern)}
        if not found:
            raise ValueError(f"{pattern!r} matches no parameter; there are {', '.join(paths)}")
        matched |= found
    return frozenset(matched)


def trainable(params: Any, frozen: Collection[str]) -> Any:
    """`params` with None in place of every frozen leaf: a tree that has the others as its only leaves."""
    leaves, structure = jax.tree.flatten(params)
    kept = [None if path in frozen else leaf for path, leaf in zip(paths_of(params), leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def with_frozen(moved: Any, params: Any) -> Any:
    """The inverse: `moved` with the leaves of `params` where it holds None."""
    return jax.tree.map(lambda new, old: old if new is None else new, moved, params, is_leaf=lambda leaf: leaf is None)
