"""What tensor cores compute, in numpy: arrays have a leading axis of trials of one shape.

A step adds N products and the accumulator: aligned to the largest of them, truncated to 24 + x bits, added exactly,
truncated to 24 bits (Fasi et al. 2021, PeerJ CS 7:e330; Khattak and Mikaitis 2025, arXiv 2512.07004).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dpdist.mechanism.clipping import tensor_cores


class Core(NamedTuple):
    """A tensor core's way of adding, and the format of its operands."""

    name: str
    products: int
    extra_bits: int
    format: str

    @property
    def bits(self) -> int:
        """The significand's bits; the hidden one counts."""
        return {"bfloat16": 8, "tf32": 11}[self.format]


#: A V100's are for float16, which has TF32's significand; its narrow exponents are not emulated.
CORES = (
    Core("V100 float16", 4, 0, "tf32"),
    Core("A100 bfloat16", 8, 1, "bfloat16"),
    Core("A100 tf32", 4, 1, "tf32"),
    Core("H100 bfloat16", 16, 2, "bfloat16"),
    Core("H100 tf32", 8, 2, "tf32"),
)
NOTHING = -10_000  # the exponent of 0


def product(a: np.ndarray, b: np.ndarray, core: Core, *, split: int = 1, flush: bool = False) -> np.ndarray:
    """Return a [trials, r, k] times b [trials, k, s] as the core computes it, in float64.

    Args:
        split: the number of parts of k that are added up in float32 in the end (split-K).
        flush: operands and results below 2^-126 are 0.
    """
    a, b = (_flushed(x.astype(np.float64), flush) for x in (a, b))
    left, right = _exponents(a), _exponents(b)
    total = np.zeros((a.shape[0], a.shape[1], b.shape[2]))
    for part in np.array_split(np.arange(a.shape[2]), split):
        accumulator = np.zeros_like(total)
        for start in range(0, len(part), core.products):
            k = part[start : start + core.products]
            terms = _flushed(a[:, :, k, None] * b[:, None, k, :], flush)
            largest = (left[:, :, k, None] + right[:, None, k, :]).max(axis=2)
            quantum = np.ldexp(1.0, np.maximum(largest, _exponents(accumulator)).clip(-132) - 23 - core.extra_bits)
            steps = np.trunc(terms / quantum[:, :, None]).sum(axis=2) + np.trunc(accumulator / quantum)
            accumulator = _flushed(_truncated(steps * quantum), flush)
        total = _flushed((total + accumulator).astype(np.float32).astype(np.float64), flush)
    return total


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Return x rounded to nearest with so many significant bits, and to float32's exponents."""
    exponent = np.maximum(np.frexp(x)[1], -125)
    return np.ldexp(np.rint(np.ldexp(x, bits - exponent)), exponent - bits)


def folded(weights: np.ndarray, g: np.ndarray, core: Core, *, pieces: int = 1, flush: bool = False) -> list[np.ndarray]:
    """Return weights [trials] times g, a float32 product, rounded to the format: in pieces, each the others' rest."""
    rest = _flushed((weights[:, None, None].astype(np.float32) * g.astype(np.float32)).astype(np.float64), flush)
    found = []
    for _ in range(pieces):
        found.append(_flushed(rounded(rest, core.bits), flush))
        rest = rest - found[-1]
    return found


def inner_products(x: np.ndarray, core: Core, *, split: int = 1, flush: bool = False) -> np.ndarray:
    """Return all inner products of the rows of x [trials, t, width], long rows in pieces added up in float64."""
    width = x.shape[2]
    step = tensor_cores.PIECE if width > tensor_cores.LONGEST else width
    pieces = [x[:, :, start : start + step] for start in range(0, width, step)]
    return sum(
        (product(piece, piece.swapaxes(1, 2), core, split=split, flush=flush) for piece in pieces),
        np.zeros((*x.shape[:2], x.shape[1])),
    )


def terms(a: np.ndarray, g: np.ndarray, core: Core, *, split: int = 1, flush: bool = False) -> tensor_cores.Terms:
    """Return the bound's terms of a [trials, t, m] and g [trials, t, n], each [trials]."""
    P, Q = (inner_products(x, core, split=split, flush=flush) for x in (a, g))
    norms = [
        tensor_cores.row_norms(np.diagonal(x, axis1=1, axis2=2), width)
        for x, width in ((P, a.shape[2]), (Q, g.shape[2]))
    ]
    return tensor_cores.terms_of(P, Q, (norms[0],) * 2, (norms[1],) * 2, a.shape[2], g.shape[2])


def _exponents(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def _truncated(x: np.ndarray) -> np.ndarray:
    """Return x in float32, rounded towards 0."""
    exponent = np.maximum(np.frexp(x)[1], -125)
    return np.ldexp(np.trunc(np.ldexp(x, 24 - exponent)), exponent - 24)


def _flushed(x: np.ndarray, flush: bool) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, 0.0, x) if flush else x
