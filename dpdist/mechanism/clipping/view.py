"""A parameter after operations that only move its entries: reshapes, transposes, slices, and casts.

They do not change the norm of a gradient. So the gradient is computed at the view and mapped back to the parameter. The
map back runs in float32: where the loss casts a parameter to bfloat16, the sum of clipped gradients must not be rounded
to bfloat16 too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """A value whose entries are (some of) the entries of one parameter leaf."""

    leaf: int
    leaf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    #: The operations from the leaf to the value: (name in `jax.lax`, arguments) each.
    operations: tuple[tuple[str, tuple[Any, ...]], ...]
    #: The leaf's axis behind each axis of the value, None for one of size 1. None as a whole once a reshape mixed axes.
    axes: tuple[int | None, ...] | None
    #: The part of each of the leaf's axes that is visible, [start, stop).
    region: Region

    def through(self, name: str, params: dict[str, Any], aval: Any, literals: list[Any]) -> View | None:
        """Return the view after one more operation; None if that operation does more than move entries.

        Args:
            name: the operation's primitive.
            params: its equation parameters.
            aval: shape and dtype of its output.
            literals: its inputs where they are constants, None for the others.
        """
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            return None
        shape = tuple(aval.shape)
        if name in ("convert_element_type", "copy"):
            return self
        if name == "transpose":
            order = tuple(params["permutation"])
            axes = None if self.axes is None else tuple(self.axes[i] for i in order)
            return replace(self, shape=shape, operations=(*self.operations, ("transpose", (order,))), axes=axes)
        reshaped = name in ("squeeze", "expand_dims") or (name == "reshape" and params["dimensions"] is None)
        if reshaped or (name == "broadcast_in_dim" and math.prod(shape) == math.prod(self.shape)):
            operations = (*self.operations, ("reshape", (shape,)))
            return replace(self, shape=shape, operations=operations, axes=self._axes_after_reshape(shape))
        if name == "slice" and params["strides"] in (None, (1,) * len(shape)):
            return self._cut(tuple(params["start_indices"]), shape)
        if name == "dynamic_slice" and all(value is not None for value in literals[1:]):
            # XLA clamps the start so that the slice lies within the array.
            starts = [
                int(np.clip(int(value), 0, full - part))
                for value, full, part in zip(literals[1:], self.shape, shape, strict=True)
            ]
            return self._cut(tuple(starts), shape)
        return None

    def _axes_after_reshape(self, shape: tuple[int, ...]) -> tuple[int | None, ...] | None:
        """Return `axes` after a reshape to `shape`; None unless it only adds and drops axes of size 1."""
        if self.axes is None:
            return None
        kept = [axis for axis, size in zip(self.axes, self.shape, strict=True) if size != 1]
        if [size for size in self.shape if size != 1] != [size for size in shape if size != 1]:
            return None
        remaining = iter(kept)
        return tuple(None if size == 1 else next(remaining) for size in shape)

    def _cut(self, starts: tuple[int, ...], shape: tuple[int, ...]) -> View | None:
        if self.axes is None:
            return None
        region, axes = list(self.region), list(self.axes)
        for position, (start, size) in enumerate(zip(starts, shape, strict=True)):
            axis = self.axes[position]
            if axis is not None:
                region[axis] = (region[axis][0] + start, region[axis][0] + start + size)
                axes[position] = None if size == 1 else axis
        limits = tuple(start + size for start, size in zip(starts, shape, strict=True))
        operations = (*self.operations, ("slice", (starts, limits)))
        return replace(self, shape=shape, operations=operations, axes=tuple(axes), region=tuple(region))

    def apply(self, leaf: Array) -> Array:
        """Return the view of `leaf`, in the leaf's own dtype."""
        value = leaf
        for name, arguments in self.operations:
            value = getattr(jax.lax, name)(value, *arguments)
        return value

    def to_leaf(self, gradient: Array) -> Array:
        """Turn a gradient of the view into one of the leaf: float32, and zero outside the region."""
        leaf = jax.ShapeDtypeStruct(self.leaf_shape, jnp.float32)
        (whole_gradient,) = jax.linear_transpose(self.apply, leaf)(gradient.astype(jnp.float32))
        return whole_gradient


def whole(leaf: int, shape: tuple[int, ...]) -> View:
    """Return the view that shows a leaf unchanged."""
    axes = tuple(None if size == 1 else axis for axis, size in enumerate(shape))
    return View(leaf, tuple(shape), tuple(shape), (), axes, tuple((0, size) for size in shape))


def disjoint(one: Region, other: Region) -> bool:
    """True if no entry lies in both regions."""
    return any(stop <= first or last <= start for (start, stop), (first, last) in zip(one, other, strict=True))
