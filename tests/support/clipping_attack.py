"""Examples built to add more than C to a clipped sum on tensor cores, and what they add there.

    python tests/support/clipping_attack.py --trials 100000

prints the largest contributions found, over C, by family and core.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tensor_cores import CORES, Core, folded, product, rounded, terms

from dpdist.mechanism.clipping import tensor_cores

Random = np.random.Generator
Factors = tuple[np.ndarray, np.ndarray]
Shape = tuple[int, int, int, int]  # trials, t, m, n


class Product(NamedTuple):
    """How a core computes the sum of an example's rows and of others', which are 0 here.

    Args:
        flush: what underflows is 0.
        before, after, between: the number of zero rows before and after the example's, and after each of its rows.
        pieces: the number of arrays that the weighted right factor is rounded to.
    """

    core: Core
    split: int = 1
    flush: bool = False
    before: int = 0
    after: int = 0
    between: int = 0
    pieces: int = 1


def bounds(a: np.ndarray, g: np.ndarray, how: Product) -> Factors:
    """Return the (relative, absolute) bound, each [trials], of a [trials, t, m] and g [trials, t, n]."""
    (_, t, m), n = a.shape, g.shape[2]
    unit, found = tensor_cores.UNIT_ROUNDOFF[how.core.format], terms(a, g, how.core, split=how.split, flush=how.flush)
    relative, absolute = tensor_cores.contribution_bound(found, unit**how.pieces, how.pieces * t, n, m * n)
    return relative, absolute


def weights(relative: np.ndarray, absolute: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Return the weight that keeps each example within `clip`, in float32, rounded down."""
    with np.errstate(divide="ignore"):
        found = np.minimum(1.0, np.maximum(clip - absolute, 0) / relative)
    return (found * (1 - 2.0**-22)).astype(np.float32)


def contributions(a: np.ndarray, g: np.ndarray, weight: np.ndarray, how: Product) -> np.ndarray:
    """Return the norm of what each example adds to the sum with a weight, [trials]."""
    pieces = folded(weight, g, how.core, pieces=how.pieces, flush=how.flush)
    left, right = (
        np.concatenate([_among_zeros(x, how) for x in parts], axis=1) for parts in ([a] * how.pieces, pieces)
    )
    found = product(left.swapaxes(1, 2), right, how.core, split=how.split, flush=how.flush)
    return np.sqrt(np.square(found).sum(axis=(1, 2)))


def _among_zeros(rows: np.ndarray, how: Product) -> np.ndarray:
    spread = np.pad(rows[:, :, None], ((0, 0), (0, 0), (0, how.between), (0, 0))).reshape(len(rows), -1, rows.shape[2])
    return np.pad(spread, ((0, 0), (how.before, how.after), (0, 0)))


def aimed(g: np.ndarray, size: np.ndarray, core: Core) -> np.ndarray:
    """Return weights near `size` [trials] that move the largest entry of g just over half a unit in the last place."""
    largest = np.abs(g).max(axis=(1, 2))
    scaled = np.where(largest == 0, 1.0, largest) * size
    exponent = np.frexp(scaled)[1] - 1
    return np.ldexp(1 + 2.0**-core.bits * (1 + 2.0**-10), exponent) / np.where(largest == 0, 1.0, largest)


def over_clip(a: np.ndarray, g: np.ndarray, wanted: np.ndarray, how: Product) -> np.ndarray:
    """Return contribution / C, [trials], where C is such that an example's weight is about `wanted`."""
    relative, absolute = bounds(a, g, how)
    clip = np.minimum(wanted, 1.0) * relative + absolute
    return contributions(a, g, weights(relative, absolute, clip), how) / clip


# Ten families of examples ---------------------------------------------------------------------------------------------


def gaussian(random: Random, shape: Shape, bits: int) -> Factors:
    trials, t, m, n = shape
    return random.normal(size=(trials, t, m)), random.normal(size=(trials, t, n))


def positive(random: Random, shape: Shape, bits: int) -> Factors:
    """All errors of truncation have one sign."""
    a, g = gaussian(random, shape, bits)
    return np.abs(a) + 0.5, np.abs(g) + 0.5


def cancelling(random: Random, shape: Shape, bits: int) -> Factors:
    """The second half of the rows takes the first half away, but for a nudge."""
    a, g = (rounded(x, bits) for x in gaussian(random, shape, bits))
    half = (shape[1] + 1) // 2
    a[:, half:], nudge = a[:, : shape[1] - half], 2.0 ** -random.integers(1, bits, (shape[0], 1, 1))
    g[:, half:] = -g[:, : shape[1] - half] * (1 + nudge)
    return a, g


def one_unit_left(random: Random, shape: Shape, bits: int) -> Factors:
    """All rows cancel but for one unit in the last place of one entry."""
    a, g = (rounded(x, bits) for x in gaussian(random, shape, bits))
    half = (shape[1] + 1) // 2
    a[:, half:], g[:, half:] = a[:, : shape[1] - half], -g[:, : shape[1] - half]
    g[:, random.integers(shape[1]), random.integers(shape[3])] *= 1 + 2.0 ** (1 - bits)
    return a, g


def heavy_tails(random: Random, shape: Shape, bits: int) -> Factors:
    a, g = gaussian(random, shape, bits)
    return a * 2.0 ** random.integers(-12, 12, a.shape), g * 2.0 ** random.integers(-12, 12, g.shape)


def low_rank(random: Random, shape: Shape, bits: int) -> Factors:
    trials, t, m, n = shape
    sizes = random.normal(size=(trials, t, 1))
    signs = np.where(random.random((trials, t, 1)) < 0.5, 1, -1)
    a = sizes * random.normal(size=(trials, 1, m))
    return a, random.permuted(sizes, axis=1) * random.normal(size=(trials, 1, n)) * signs


def one_mantissa(random: Random, shape: Shape, bits: int) -> Factors:
    """With one mantissa in all of g, the folded weight rounds all of it one way."""
    trials, t, m, n = shape
    mantissa = 1 + random.integers(0, 2 ** (bits - 1), (trials, 1, 1)) * 2.0 ** (1 - bits)
    a = np.ones((trials, t, m)) * 2.0 ** random.integers(-2, 3, (trials, t, 1))
    return a, mantissa * 2.0 ** random.integers(-1, 2, (trials, t, n))


def one_mantissa_signed(random: Random, shape: Shape, bits: int) -> Factors:
    a, g = one_mantissa(random, shape, bits)
    return tuple(x * np.where(random.random((*x.shape[:2], 1)) < 0.5, 1, -1) for x in (a, g))


def underflowing(random: Random, shape: Shape, bits: int) -> Factors:
    """Squares and products, or the weighted g, below the smallest normal number."""
    a, g = gaussian(random, shape, bits)
    low, high = random.integers(-75, 20, (shape[0], 1, 1)), random.integers(-70, 50, (shape[0], 1, 1))
    return a * 2.0**low, g * 2.0**high


def swamped(random: Random, shape: Shape, bits: int) -> Factors:
    """Large entries and rows come first, and what comes after them falls below the accumulator's last place."""
    a, g = (np.abs(x) for x in gaussian(random, shape, bits))
    small = 2.0 ** -random.integers(8, 14, (shape[0], 1, 1))
    for x in (a, g):
        x[:, :, 1:] *= small
        x[:, 1:] *= small
    return a, g * np.where(np.arange(shape[1]) == 0, 1, -1)[None, :, None]


FAMILIES: tuple[Callable[[Random, Shape, int], Factors], ...] = (
    gaussian, positive, cancelling, one_unit_left, heavy_tails,
    low_rank, one_mantissa, one_mantissa_signed, underflowing, swamped,
)  # fmt: skip


#: t, m, n.
SHAPES = (
    (1, 1, 1), (2, 1, 1), (3, 2, 5), (4, 4, 4), (6, 17, 2), (11, 3, 8), (16, 8, 8), (23, 20, 13), (36, 1, 1),
    (4, 512, 8), (64, 4, 4), (197, 3, 2), (600, 1, 1), (2, 3072, 2), (1, 2, 3072), (1, 5000, 1),
)  # fmt: skip

# The attack -----------------------------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """A batch of examples in one product: contribution / C of each."""

    family: str
    core: str
    ratios: np.ndarray


def attempts(random: Random, trials: int, batch: int, *, climb: float = 0.05) -> Iterator[Attempt]:
    """Attack with random families, cores, shapes, weights and neighbours; some batches climb uphill from there."""
    made = 0
    while made < trials:
        family, core = FAMILIES[random.integers(len(FAMILIES))], CORES[random.integers(len(CORES))]
        t, m, n = SHAPES[random.integers(len(SHAPES))]
        size = batch if t * max(t, m, n) < 1000 else batch // 16
        a, g = (rounded(x, core.bits) for x in family(random, (size, t, m, n), core.bits))
        split, pieces = int(random.choice([1, 1, 2, 3])), int(random.choice([1, 1, 2]))
        before, after = (int(x) for x in random.integers(0, 40, 2) * random.integers(0, 2))
        between = int(random.choice([0, 0, 1, 15]))
        how = Product(core, split, bool(random.integers(2)), before, after, between, pieces)
        ratios = over_clip(a, g, _weights(random, g, core, family is underflowing), how)
        made += size
        if size == batch and random.random() < climb:
            best = np.argsort(ratios)[-size // 4 :]
            ratios[best], more = _climbed(random, a[best], g[best], ratios[best], how)
            made += more
        yield Attempt(family.__name__, core.name, ratios)


def _weights(random: Random, g: np.ndarray, core: Core, small: bool) -> np.ndarray:
    size = 2.0 ** -random.uniform(0, 100 if small and random.integers(2) else 8, len(g))
    return aimed(g, size, core) if random.integers(3) else size


def _climbed(random: Random, a: np.ndarray, g: np.ndarray, best: np.ndarray, how: Product) -> tuple[np.ndarray, int]:
    """Change every example a little, 40 times, and keep what adds more; return contribution / C and the trials."""
    wanted = _weights(random, g, how.core, False)
    rounds, trial = 40, np.arange(len(a))
    for _ in range(rounds):
        a_new, g_new, wanted_new = a.copy(), g.copy(), wanted
        row, left, right = (random.integers(0, size, len(a)) for size in (a.shape[1], a.shape[2], g.shape[2]))
        match random.integers(6):
            case 0:
                a_new[trial, row, left] *= 1 + 0.1 * random.normal(size=len(a))
            case 1:
                g_new[trial, row, right] *= 1 + 0.1 * random.normal(size=len(a))
            case 2:
                g_new[trial, row] *= -1
            case 3:
                g_new[trial, row, right] = g_new[trial, 0, 0] * 2.0 ** random.integers(-2, 3, len(a))
            case 4:
                a_new[trial, row] *= 2.0 ** random.integers(-2, 3, (len(a), 1))
            case _:
                wanted_new = aimed(g, wanted * 2.0 ** random.normal(size=len(a)), how.core)
        a_new, g_new = rounded(a_new, how.core.bits), rounded(g_new, how.core.bits)
        ratios = over_clip(a_new, g_new, wanted_new, how)
        better = ratios > best
        a, g = np.where(better[:, None, None], a_new, a), np.where(better[:, None, None], g_new, g)
        wanted, best = np.where(better, wanted_new, wanted), np.maximum(ratios, best)
    return best, rounds * len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try to add more than C through emulated tensor cores.")
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, random = time.monotonic(), np.random.default_rng(options.seed)
    largest: dict[tuple[str, str], float] = collections.defaultdict(float)
    over = 0
    for attempt in attempts(random, options.trials, 128):
        key = attempt.family, attempt.core
        largest[key] = max(largest[key], float(attempt.ratios.max()))
        over += int((attempt.ratios > 1).sum())
    names = [core.name for core in CORES]
    print("| largest contribution / C |", " | ".join(names), "|")
    for family in FAMILIES:
        print("|", family.__name__, "|", " | ".join(f"{largest[family.__name__, name]:.6f}" for name in names), "|")
    print(f"{over} of {options.trials} over C, seed {options.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
