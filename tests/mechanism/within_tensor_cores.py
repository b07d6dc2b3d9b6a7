"""How far one record can move the rounding of the others in a product on tensor cores, by attacks built for that.

`PYTHONPATH=tests/support python tests/mechanism/within_tensor_cores.py` prints the table.

A product adds up p records of T rows each, in emulated cores; no record's gradient is longer than C = 1, and its terms
add up to at most `ratio` in magnitude. What counts is how far the sums with and without one record lie apart, beyond
that record's exact gradient, in units of C.
"""

from __future__ import annotations

import numpy as np
from tensor_cores import CORES, Core, product, rounded

from dpdist.mechanism.clipping.tensor_cores import gamma

RATIO = 16.0


def bound(physical: int, rows: int, ratio: float = RATIO) -> float:
    """kappa / C: two products with and without a record, of p examples of T rows each, whose terms add up to r C."""
    return 4 * physical * (ratio if rows > 1 else 1.0) * gamma(physical * rows)


def moved(a: np.ndarray, g: np.ndarray, gone: int, core: Core) -> float:
    """Return what taking record `gone` out of a [p, T, m] and g [p, T, n] moves, beyond its own gradient."""
    without = g.copy()
    without[gone] = 0
    rows = a.reshape(1, -1, a.shape[2]).swapaxes(1, 2)
    one, other = (product(rows, x.reshape(1, -1, g.shape[2]), core)[0] for x in (g, without))
    return float(np.linalg.norm(one - other - a[gone].T @ g[gone]))


def at_random(random: np.random.Generator, physical: int, rows: int, core: Core, *, width: int = 4) -> float:
    """The effect of a record where all gradients are random, of length C."""
    a = rounded(random.normal(size=(physical, rows, width)), core.bits)
    g = random.normal(size=(physical, rows, width))
    norms = np.linalg.norm(a.swapaxes(1, 2) @ g, axis=(1, 2), keepdims=True)
    return moved(a, rounded(g / norms, core.bits), int(random.integers(physical)), core)


def crossing(physical: int, rows: int, core: Core, ratio: float = RATIO) -> float:
    """The effect of a record that lifts the accumulator over a power of two, so that later rows lose a bit more.

    `before` records add C each. Then comes the record, and the others: each adds `lift`, up to just below the power,
    then rows just below what the accumulator resolves above the power, then takes `lift` away. Where the record is
    present they all vanish, where it is not half of each is kept.
    """
    lift = (ratio / 2 if rows > 2 else 0.0) - 0.5
    before, power = max(
        ((h, int(np.floor(np.log2(h + max(lift, 0) + 0.5)))) for h in range(physical - 1)),
        key=lambda each: (physical - 1 - each[0]) * 2.0 ** each[1],
    )
    small = 0.98 * 2.0 ** (power - 23 - core.extra_bits)
    g = np.zeros((physical, rows, 1))
    g[:before, 0], g[before, 0] = 1.0, 0.75
    base = 2.0**power - before - 0.5
    if rows > 2:
        g[before + 1 :, 0], g[before + 1 :, -1], g[before + 1 :, 1:-1] = base, -base, small
    else:
        g[:before, 0] = (2.0**power - 0.5) / max(before, 1)
        g[before + 1 :] = small
    g = rounded(g, core.bits)
    assert np.abs(g).sum(axis=(1, 2)).max() <= (ratio if rows > 1 else 1.0)
    assert np.abs(g.sum(axis=(1, 2))).max() <= 1
    return moved(np.ones_like(g), g, before, core)


def swallowing(physical: int, rows: int, core: Core) -> float:
    """The effect of a record that comes first, and below whose last place all others' rows are."""
    g = np.full((physical, rows, 1), 0.98 * 2.0 ** -(23 + core.extra_bits))
    g[0], g[0, 0] = 0, 1
    return moved(np.ones_like(g), rounded(g, core.bits), 0, core)


def built(physical: int, rows: int, core: Core, ratio: float = RATIO) -> float:
    """The largest effect of the attacks that are built."""
    return max(crossing(physical, rows, core, ratio), swallowing(physical, rows, core))


def main() -> None:
    random = np.random.default_rng(0)
    print("| core | p | T | bound / C | built / C | at random / C |\n| --- | --- | --- | --- | --- | --- |")
    for core in CORES[1:]:
        for physical in (8, 32):
            for rows in (1, 197):
                found = max(at_random(random, physical, rows, core) for _ in range(20))
                worst = bound(physical, rows), built(physical, rows, core), found
                print(f"| {core.name} | {physical} | {rows} |", " | ".join(f"{x:.2g}" for x in worst), "|", flush=True)


if __name__ == "__main__":
    main()
