"""Write the gradient of a matrix product, a convolution or a table lookup as a sum of outer products.

For one example, the gradient with respect to the parameter operand is the sum over t of left[t]^T right[t], where
`left` comes from the data operand and `right` is the gradient at the output (Goodfellow 2015, arXiv 1510.01799; Li et
al. 2022, arXiv 2110.05679; Bu et al. 2022, arXiv 2205.10683, for convolutions). The factors give the gradient's norm
without the gradient itself, and a weighted sum over examples is one product over examples and t together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dpdist.mechanism.clipping.flatten import shape_of
from dpdist.mechanism.clipping.graph import Graph, Use
from dpdist.mechanism.clipping.view import View


@dataclass(frozen=True)
class Factors:
    """The two factors whose product is the gradient of one use with respect to its parameter-derived operand.

    left is [groups, t, m], or the row numbers [t] where its rows are one-hot (then groups = 1); right is [groups, t,
    n]. The gradient is `arrange(sum_t left^T right)`, where the sum is [groups, m, n].
    """

    #: The view of one parameter that the operand is; None if it is computed from parameters, as a standardised weight.
    view: View | None
    groups: int
    #: The number of positions t.
    length: int
    m: int
    n: int
    #: The axes of the operand that make up the columns of left, the columns of right, and the groups; in order.
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    #: For one example: the left factor from the data operand, the right factor from the gradient at the output.
    left: Callable[[Any], Array]
    right: Callable[[Any], Array]
    #: Rearranges [groups, m, n] to the shape of the operand.
    arrange: Callable[[Array], Array]
    #: The position of the data operand among the equation's inputs.
    operand: int
    #: That operand's variable, by which uses of the same data are known.
    data: Any = None
    one_hot: bool = False

    @property
    def weighted_left(self) -> bool:
        """Whether a short format has the weight in left: where it is the smaller, or shared with uses of equal size."""
        return not self.one_hot and self.m <= self.n


def factors_of(graph: Graph, use: Use) -> Factors | None:
    """Return the factors of a use; None if its gradient is not such a product."""
    equation = use.equation
    rule = _RULES.get(equation.primitive.name)
    if len(use.operands) != 1 or len(use.outputs) != 1 or rule is None:
        return None
    if jnp.iscomplexobj(shape_of(equation.outvars[0])):  # a sum of outer products, but not of real ones
        return None
    position = use.operands[0]
    view = graph.views.get(equation.invars[position])
    found = rule(equation.params, position, [*map(shape_of, equation.invars)], shape_of(equation.outvars[0]), view)
    return None if found is None else replace(found, data=equation.invars[found.operand])


def _dot_general(params: dict[str, Any], position: int, avals: Sequence[Any], out: Any, view: View | None) -> Factors:
    (contract, batch) = params["dimension_numbers"]
    other = 1 - position
    data, parameter = avals[other], avals[position]
    contract_data, contract_param = contract[other], contract[position]
    batch_data, batch_param = batch[other], batch[position]
    free_data = [i for i in range(data.ndim) if i not in (*contract_data, *batch_data)]
    free_param = [i for i in range(parameter.ndim) if i not in (*contract_param, *batch_param)]
    groups = math.prod(data.shape[i] for i in batch_data)
    length = math.prod(data.shape[i] for i in free_data)
    m = math.prod(parameter.shape[i] for i in contract_param)
    n = math.prod(parameter.shape[i] for i in free_param)
    # The output has the batch axes first, then the free axes of operand 0, then those of operand 1.
    first, second = (len(free_data), len(free_param)) if other == 0 else (len(free_param), len(free_data))
    batch_axes = list(range(len(batch_data)))
    free_0 = list(range(len(batch_axes), len(batch_axes) + first))
    free_1 = list(range(len(batch_axes) + first, len(batch_axes) + first + second))
    rows, columns = (free_0, free_1) if other == 0 else (free_1, free_0)
    order = [*batch_param, *contract_param, *free_param]

    def arrange(product: Array) -> Array:
        return jnp.transpose(product.reshape([parameter.shape[i] for i in order]), np.argsort(order).tolist())

    return Factors(
        view=view,
        groups=groups,
        length=length,
        m=m,
        n=n,
        axes=(tuple(contract_param), tuple(free_param), tuple(batch_param)),
        left=lambda x: jnp.transpose(x, (*batch_data, *free_data, *contract_data)).reshape(groups, length, m),
        right=lambda g: jnp.transpose(g, (*batch_axes, *rows, *columns)).reshape(groups, length, n),
        arrange=arrange,
        operand=other,
    )


def _gather(params: dict[str, Any], position: int, avals: Sequence[Any], out: Any, view: View | None) -> Factors | None:
    """A lookup of whole rows, as in an embedding; None for any other gather."""
    table, indices, numbers = avals[0], avals[1], params["dimension_numbers"]
    row = table.shape[1:]
    whole_rows = (
        position == 0
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(params["slice_sizes"]) == (1, *row)
        and numbers.offset_dims == tuple(range(indices.ndim - 1, indices.ndim - 1 + len(row)))
    )
    if not whole_rows:
        return None
    clamp = params["mode"] == lax.GatherScatterMode.CLIP
    length, n = math.prod(indices.shape[:-1]), math.prod(row)

    def left(x: Array) -> Array:
        rows = x.reshape(length)
        if jnp.issubdtype(rows.dtype, jnp.unsignedinteger) and rows.dtype.itemsize >= 4:
            rows = jnp.minimum(rows, rows.dtype.type(table.shape[0]))
        rows = rows.astype(jnp.int64 if rows.dtype.itemsize == 8 else jnp.int32)  # shorter ones may not hold the bounds
        # A row out of range has no gradient, in JAX's default mode too, unless it is asked to be the nearest row.
        outside = (rows < 0) | (rows >= table.shape[0])
        return jnp.clip(rows, 0, table.shape[0] - 1) if clamp else jnp.where(outside, -1, rows)

    return Factors(
        view=view,
        groups=1,
        length=length,
        m=table.shape[0],
        n=n,
        one_hot=True,
        axes=((0,), tuple(range(1, table.ndim)), ()),
        left=left,
        right=lambda g: g.reshape(1, length, n),
        arrange=lambda product: product.reshape(table.shape),
        operand=1,
    )


def _convolution(
    params: dict[str, Any], position: int, avals: Sequence[Any], out: Any, view: View | None
) -> Factors | None:
    """A convolution, as a matrix product over the patches that its kernel sees."""
    if position != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    image, kernel = avals[0], avals[1]
    lhs, rhs, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = params["feature_group_count"]
    size = [kernel.shape[i] for i in rhs[2:]]
    spatial = [image.shape[i] for i in lhs[2:]]
    channels, features = image.shape[lhs[1]], kernel.shape[rhs[0]]
    out_spatial = [out.shape[i] for i in result[2:]]
    rows = image.shape[lhs[0]]
    positions, window = math.prod(out_spatial), math.prod(size)
    index = _patch_index(params, spatial, size, out_spatial)
    m, n, length = window * channels // groups, features // groups, rows * positions

    def left(x: Array) -> Array:
        flat = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1])).reshape(rows, math.prod(spatial), channels)
        patches = _patches(flat, index, spatial, size, out_spatial, params)  # [rows, positions, window, channels]
        grouped = patches.reshape(length, window, groups, channels // groups)
        return jnp.transpose(grouped, (2, 0, 1, 3)).reshape(groups, length, m)

    def right(g: Array) -> Array:
        flat = jnp.transpose(g, (result[0], *result[2:], result[1])).reshape(length, groups, n)
        return jnp.transpose(flat, (1, 0, 2))

    def arrange(product: Array) -> Array:
        split = product.reshape(groups, *size, channels // groups, n)
        axes = len(size)
        # To [output features (group, n), input features, *window], then to the kernel's own order of axes.
        ordered = jnp.transpose(split, (0, axes + 2, axes + 1, *range(1, axes + 1)))
        ordered = ordered.reshape(features, channels // groups, *size)
        return jnp.transpose(ordered, np.argsort(rhs).tolist())

    return Factors(
        view=view,
        groups=groups,
        length=length,
        m=m,
        n=n,
        axes=((*rhs[2:], rhs[1]), (rhs[0],), ()),
        left=left,
        right=right,
        arrange=arrange,
        operand=0,
    )


def _patch_index(params: dict[str, Any], spatial: Sequence[int], size: Sequence[int], out: Sequence[int]) -> np.ndarray:
    """Return [positions, window]: the pixel that each window element sees, -1 where it sees padding or a gap."""
    index = np.zeros((*out, *size), np.int64)
    inside = np.ones((*out, *size), bool)
    axes = len(spatial)
    for axis in range(axes):
        coordinates = np.arange(out[axis])[:, None] * params["window_strides"][axis]
        coordinates = coordinates + np.arange(size[axis]) * params["rhs_dilation"][axis] - params["padding"][axis][0]
        dilation = params["lhs_dilation"][axis]
        valid = (coordinates % dilation == 0) & (coordinates >= 0) & (coordinates // dilation < spatial[axis])
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = coordinates.shape
        index = index * spatial[axis] + np.where(valid, coordinates // dilation, 0).reshape(shape)
        inside &= valid.reshape(shape)
    return np.where(inside, index, -1).reshape(math.prod(out), math.prod(size))


def _patches(
    flat: Array,
    index: np.ndarray,
    spatial: Sequence[int],
    size: Sequence[int],
    out: Sequence[int],
    params: dict[str, Any],
) -> Array:
    """Turn [rows, pixels, channels] into [rows, positions, window, channels]; only moves entries, so rounds nothing."""
    rows, _, channels = flat.shape
    tiles = tuple(params["window_strides"]) == tuple(size) and tuple(spatial) == tuple(
        a * b for a, b in zip(size, out, strict=True)
    )
    if tiles and set(params["lhs_dilation"]) | set(params["rhs_dilation"]) == {1} and not np.any(params["padding"]):
        # Windows that tile the image without overlap, as in a patch embedding: a transpose is enough.
        split = flat.reshape(rows, *(side for pair in zip(out, size, strict=True) for side in pair), channels)
        axes = len(size)
        order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
        return jnp.transpose(split, order).reshape(rows, *index.shape, channels)
    if np.any(index < 0):
        flat = jnp.concatenate([flat, jnp.zeros((rows, 1, channels), flat.dtype)], axis=1)
    return jnp.take(flat, np.where(index < 0, flat.shape[1] - 1, index), axis=1, mode="clip")


_RULES: dict[str, Callable[..., Factors | None]] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _convolution,
}
