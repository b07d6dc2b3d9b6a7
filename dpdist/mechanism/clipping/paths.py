"""Parameters by path, such as `layers/0/kernel`, and the split into trainable and frozen ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax


def paths_of(params: Any) -> list[str]:
    """Return the path of every leaf, in the order of `jax.tree.leaves`."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


def matching(params: Any, patterns: Iterable[str]) -> frozenset[str]:
    """Return the paths that match at least one `fnmatch` pattern; `*` matches anything, slashes too.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    paths, matched = paths_of(params), set()
    for pattern in patterns:
        found = {path for path in paths if fnmatchcase(path, pattern)}
        if not found:
            raise ValueError(f"{pattern!r} matches no parameter; there are {', '.join(paths)}")
        matched |= found
    return frozenset(matched)


def trainable(params: Any, frozen: Collection[str]) -> Any:
    """Return `params` with None for every frozen leaf, so that the trainable ones are its only leaves."""
    leaves, structure = jax.tree.flatten(params)
    kept = [None if path in frozen else leaf for path, leaf in zip(paths_of(params), leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def with_frozen(trained: Any, params: Any) -> Any:
    """Undo `trainable`: return `trained` with the leaves of `params` wherever it holds None."""
    return jax.tree.map(lambda new, old: old if new is None else new, trained, params, is_leaf=lambda x: x is None)
