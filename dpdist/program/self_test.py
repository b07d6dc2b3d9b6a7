"""Show that the programs of a run, as compiled for its devices, bound every example: what they rest on may not hold.

Whether an example whose gradient is not finite adds nothing is decided by a comparison with infinity and a selection.
A compiler that is told to honour no NaNs (`--xla_cpu_enable_fast_math`, say) may take both out: one record then turns
all parameters to NaN. So before the first step, the programs themselves sum batches of rows that must not get through.

And the bound of `clipping.tensor_cores` assumes how much a product of short factors may lose: that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist.mechanism.clipping.tensor_cores import gamma
from dpdist.mechanism.clipping.tensor_products import Format, fitted, product

#: f(params, batch, mask) -> the sum of clipped gradients, as one vector: runs a compiled program on one physical batch.
Accumulate = Callable[[Any, dict[str, np.ndarray], np.ndarray], np.ndarray]
#: The part of C that rounding, to the grid above all, may add to the difference of two sums.
_ROUNDING = 2e-3
_ROWS = {"NaN": np.nan, "infinity": np.inf, "3": 3.0}


class BrokenGuardError(RuntimeError):
    """A compiled program does not bound what one example adds; the message says which rows got through."""


def check(
    accumulate: Accumulate,
    params: Any,
    example: Mapping[str, jax.ShapeDtypeStruct],
    batch_sizes: Collection[int],
    *,
    clip_norm: float,
) -> None:
    """Sum rows of NaNs and of infinities, padding that holds them, and rows whose gradients are NaN or far over C.

    What an example adds may depend on the model, so this asks for no more than what the guarantee rests on, whatever
    an example holds: the sum is finite, a row moves it by at most C, and padding does not move it. Integers, which
    hold no NaN, stay as they are; every row's gradient is made NaN, infinite or long by parameters that are so.

    Args:
        accumulate: is called 6 to 10 times a batch size.
        params: the initial parameters, on the host.
        example: shapes and dtypes of one example, by column.
        batch_sizes: the numbers of rows that it takes.
        clip_norm: C.

    Raises:
        BrokenGuardError: a row got through.
    """

    def require(what: str, moved: np.ndarray, allowed: int) -> None:
        bound = (allowed + _ROUNDING * (allowed + 1)) * clip_norm
        norm = float(np.linalg.norm(np.asarray(moved, np.float64)))
        if not norm <= bound:  # not even NaN
            raise BrokenGuardError(f"{what} moved the sum of {size} rows by {norm / clip_norm:.3g} C, over {allowed} C")

    for size in sorted(set(batch_sizes)):
        rows = min(len(_ROWS), max(1, size - 1))  # the others show what a bad row does to its neighbours
        padded = (np.arange(size) >= rows).astype(np.float32)
        plain = {name: np.full((size, *x.shape), _usual(name, x.dtype), x.dtype) for name, x in example.items()}
        alone = accumulate(params, plain, padded)
        for first in range(0, len(_ROWS), rows):
            values = list(_ROWS.items())[first : first + rows]
            batch = {name: column.copy() for name, column in plain.items()}
            for row, (_, value) in enumerate(values):
                for column in batch.values():
                    if jnp.issubdtype(column.dtype, jnp.inexact):
                        column[row] = value
            named = " and ".join(name for name, _ in values)
            used = np.where(np.arange(size) < len(values), 1, padded).astype(np.float32)
            require(f"padding of {named}", accumulate(params, batch, padded) - alone, 0)
            require(f"rows of {named}", accumulate(params, batch, used) - alone, len(values))
        everyone, half = np.ones(size, np.float32), (np.arange(size) % 2 == 0).astype(np.float32)
        for what, factor, offset, mask in (
            ("parameters of NaN", 1.0, np.nan, half),
            ("parameters of 1e30", 1.0, 1e30, half),
            ("parameters times 30", 30.0, 0.0, everyone),
        ):
            moved = jax.tree.map(lambda x, f=factor, o=offset: _moved(x, f, o), params)
            require(what, accumulate(moved, plain, mask), int(mask.sum()))


def largest_loss(fmt: Format) -> float:
    """Return the largest error of long products in a format on JAX's default device, over what the bound allows.

    The products are of rows that are all positive, and of one large entry with many that vanish beside it: what a
    float32 accumulator loses adds up in both. It is at most 1 on a device that the bound is for.
    """
    worst, random = 0.0, np.random.default_rng(0)
    for length in (64, 1024, 4096, 16384):
        positive, large = random.uniform(1, 2, (2, 64, length)), np.ones((64, length))
        swamped = np.exp2(-random.uniform(20, 27, (64, 1)) - random.uniform(0, 1, (64, length)))
        swamped[:, 0] = 1
        for left, right in (positive, (large, swamped), (swamped, large)):
            a, b = fitted(jnp.asarray(left, jnp.float32), fmt), fitted(jnp.asarray(right, jnp.float32), fmt)
            found = np.asarray(jax.jit(product, static_argnums=(0, 3))("tk,sk->ts", a, b, fmt), np.float64)
            x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, float(np.max(np.abs(found - x @ y.T) / (np.abs(x) @ np.abs(y).T))) / gamma(length))
    return worst


def check_products(formats: Collection[Format]) -> None:
    """Measure products in each format on JAX's default device.

    Raises:
        BrokenGuardError: they lose more than the bound of what an example adds allows for.
    """
    for fmt in formats:
        if not (found := largest_loss(fmt)) <= 1:
            raise BrokenGuardError(f"long products in {fmt} lose {found:.3g} times what the bound on them assumes")


def _usual(name: str, dtype: Any) -> float:
    """What a column holds: an integer that is always one of a range, and in a mask what does not leave anything out."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return 0.5
    return 1 if dtype == jnp.bool_ or name.endswith("mask") else 0


def _moved(leaf: Any, factor: float, offset: float) -> Any:
    array = np.asarray(leaf)
    with np.errstate(over="ignore"):  # 1e30 is infinite in float16
        return (array * factor + offset).astype(array.dtype) if jnp.issubdtype(array.dtype, jnp.inexact) else array
