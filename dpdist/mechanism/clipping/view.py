"""A parameter seen through operations that move its entries and change none of them.

Reshapes, transposes, casts and slices leave the norm of a gradient as it is, so a rule may work with the view and carry
its result back. The way back is taken in float32: a cast to bfloat16 on the way out must not round the sum of
clipped gradients on the way in.
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
    """How a value shows (a part of) one parameter leaf."""

    leaf: int
    leaf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    #: The steps from the leaf to the value, each the name of an operation and its argument.
    steps: tuple[tuple[str, Any], ...]
    #: The leaf's axis behind each axis, None for one of size 1; None altogether where a reshape has mixed axes.
    axes: tuple[int | None, ...] | None
    #: What of each axis of the leaf is seen, [start, stop).
    region: Region

    def through(self, name: str, params: dict[str, Any], aval: Any, literals: list[Any]) -> View | None:
        """The view after one more operation, or None where it does more than move entries."""
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            return None
        shape = tuple(aval.shape)
        if name in ("convert_element_type", "copy"):
            return self
        if name == "transpose":
            order = tuple(params["permutation"])
            axes = None if self.axes is None else tuple(self.axes[i] for i in order)
            return replace(self, shape=shape, steps=(*self.steps, ("transpose", order)), axes=axes)
        reshaped = name in ("squeeze", "expand_dims") or (name == "reshape" and params["dimensions"] is None)
        if reshaped or (name == "broadcast_in_dim" and math.prod(shape) == math.prod(self.shape)):
            return replace(self, shape=shape, steps=(*self.steps, ("reshape", shape)), axes=self._unit_axes(shape))
        if name == "slice" and params["strides"] in (None, (1,) * len(shape)):
            return self._cut(tuple(params["start_indices"]), shape)
        if name == "dynamic_slice" and all(value is not None for value in literals[1:]):
            # XLA moves a start that lies too far out back to the last that fits.
            starts = [
                int(np.clip(int(value), 0, full - part))
                for value, full, part in zip(literals[1:], self.shape, shape, strict=True)
            ]
            return self._cut(tuple(starts), shape)
        return None

    def _unit_axes(self, shape: tuple[int, ...]) -> tuple[int | None, ...] | None:
        """Axes after a reshape that adds and drops axes of size 1 alone."""
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
        step = ("slice", (starts, limits))
        return replace(self, shape=shape, steps=(*self.steps, step), axes=tuple(axes), region=tuple(region))

    def show(self, leaf: Array) -> Array:
        """The view of `leaf`, in the leaf's own type."""
        value = leaf
        for name, argument in self.steps:
            if name == "transpose":
                value = jnp.transpose(value, argument)
            elif name == "reshape":
                value = jnp.reshape(value, argument)
            else:
                value = jax.lax.slice(value, *argument)
        return value

    def back(self, gradient: Array) -> Array:
        """The gradient of the leaf, float32 and zero outside the region, from that of the view."""
        leaf = jax.ShapeDtypeStruct(self.leaf_shape, jnp.float32)
        (whole_gradient,) = jax.linear_transpose(self.show, leaf)(gradient.astype(jnp.float32))
        return whole_gradient


def whole(leaf: int, shape: tuple[int, ...]) -> View:
    """A leaf as it is."""
    axes = tuple(None if size == 1 else axis for axis, size in enumerate(shape))
    return View(leaf, tuple(shape), tuple(shape), (), axes, tuple((0, size) for size in shape))


def disjoint(a: Region, b: Region) -> bool:
    """True where no entry lies in both."""
    return any(
        stop_a <= start_b or stop_b <= start_a for (start_a, stop_a), (start_b, stop_b) in zip(a, b, strict=True)
    )
