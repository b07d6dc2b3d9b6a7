"""How far one record can move the float32 rounding of the others in its product, by attacks built for that.

`python tests/mechanism/within_products.py` prints the table of docs/rounding.md.

Each attack is a product of p examples whose gradients all point the same way, so that the rounding of every coordinate
goes the same way too, and whose values differ by a few units in the last place, drawn anew many times. With T rows an
example, its gradient is a sum of T outer products that nearly cancel: |a_t| |b_t| add up to `RATIO` times the gradient.
The record's presence is one row of the mask. What counts is how far the two sums in float32 lie apart, beyond what the
exact sums do, in units of C.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpdist.mechanism.clipping import clipped_grad_sum

WIDTH, RATIO, CLIP = 16, 16.0, 1.0
UNIT_ROUNDOFF = 2.0**-24


def bound(physical: int, rows: int) -> float:
    """kappa / C of docs/rounding.md: four products, of p examples of T rows each, whose terms add up to r C."""
    terms = physical * rows + 2
    gamma = terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)
    return 4 * physical * (RATIO if rows > 1 else 1.0) * gamma


def reached(physical: int, rows: int, *, attempts: int, seed: int = 0) -> float:
    """The largest effect of a record on the rounding of its product, over `attempts` attacks, over C."""
    random = np.random.default_rng(seed)

    def loss(params: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum((example["a"] @ params) * example["b"])

    method = "per_example" if rows == 1 else "bookkeeping"
    summed = jax.jit(clipped_grad_sum(loss, clip_norm=CLIP, method=method))
    params = jnp.zeros((WIDTH, WIDTH))
    worst = 0.0
    for _ in range(attempts):
        batch = _attack(random, physical, rows)
        everyone = np.ones(physical, np.float32)
        without = everyone.copy()
        without[random.integers(physical)] = 0
        one, other = (np.asarray(summed(params, batch, mask)[0], np.float64) for mask in (everyone, without))
        gone = int(np.argmin(without))
        exact = batch["a"][gone].astype(np.float64).T @ batch["b"][gone].astype(np.float64)
        worst = max(worst, float(np.linalg.norm(one - other - exact)))
    return worst / CLIP


def _attack(random: np.random.Generator, physical: int, rows: int) -> dict[str, np.ndarray]:
    """A batch whose gradients have norms a little below C, so that nothing is clipped."""
    direction = np.ones((rows, WIDTH)) / np.sqrt(WIDTH)
    size = 0.9 * (1 + 2.0**-20 * random.integers(-64, 65, (physical, rows, 1)))
    signs = np.ones((1, rows, 1))
    if rows > 1:
        # One row is the gradient; the others cancel, but only once all of one sign have been added up.
        signs[0, 1:, 0] = np.where(np.arange(rows - 1) < (rows - 1) // 2, 1.0, -1.0) * (RATIO - 1) / (rows - 1)
    a = direction[None] * np.ones((physical, 1, 1)) * np.sqrt(np.abs(signs))
    b = direction[None] * size * np.sign(signs) * np.sqrt(np.abs(signs))
    return {"a": a.astype(np.float32), "b": b.astype(np.float32)}


if __name__ == "__main__":
    print("| p | T | bound / C | reached / C |\n| --- | --- | --- | --- |")
    for physical in (16, 64, 512):
        for rows in (1, 197):
            found = reached(physical, rows, attempts=300 if rows == 1 else 60)
            print(f"| {physical} | {rows} | {bound(physical, rows):.2g} | {found:.2g} |", flush=True)
