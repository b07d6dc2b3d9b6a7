"""Measure how exactly this device accumulates long products, in the units that bounds on rounding assume.

The error of a product of d terms with float32 accumulation is bounded by gamma(d) sum |a| |b|, where we assume
gamma(d) = ASSUMED (d + 16) 2^-24 of tensor cores. We measure the largest error over sum |a| |b|, divided by (d + 16)
2^-24, on operands that fit the format exactly, so that only the accumulation is seen. The patterns are those that
accumulate worst: all terms positive, and one large term first, or in the middle, that swallows the many that follow.

    python -m dpdist_launch.measure.bench.gamma [--tiny] [--to FILE]

prints one JSON object, or with --to one line, and exits with 1 where an error exceeds what is assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from dpdist.mechanism.clipping.tensor_cores import ULPS
from dpdist.run.directory import write_atomically

#: What one step of accumulation may lose on tensor cores from V100 to B200, in units of 2^-24 of the largest magnitude.
ASSUMED = float(ULPS)
#: Format -> (explicit bits of the significand that operands may have, precision of the product).
FORMATS: dict[str, tuple[int, lax.Precision | None]] = {
    "bf16": (7, None),
    "tf32": (10, None),  # JAX's default for float32: TF32 where the device has it
    "float32": (23, lax.Precision.HIGHEST),
}
PATTERNS = ("positive", "signs", "swamped first", "swamped middle")


def fitting(x: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest with `bits` explicit bits of significand; exponents must be those of normal float32 numbers."""
    significand, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(significand, bits + 1)), exponent - bits - 1).astype(np.float32)


def operands(pattern: str, rows: int, d: int, bits: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [rows, d] and [d, rows] whose numbers fit the format."""
    if pattern.startswith("swamped"):
        # The product of a large pair is 1; all others are negative and below its last bit: 2^-20 to 2^-29 each.
        at = 0 if pattern.endswith("first") else d // 2
        a = np.ones((rows, d)) * 2.0 ** rng.integers(-3, 3, (rows, 1))
        b = np.ones((d, rows)) * -(2.0 ** -rng.integers(23, 28, (1, rows)).astype(float)) * 1.9921875
        a[:, at], b[at] = 1, 1
        return a.astype(np.float32), b.astype(np.float32)
    a, b = rng.standard_normal((rows, d)), rng.standard_normal((d, rows))
    if pattern == "positive":
        a, b = np.abs(a), np.abs(b)
    return fitting(a, bits), fitting(b, bits)


def error_of(computed: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest |computed - a b| / (|a| |b|), divided by (d + 16) 2^-24 for d terms; all in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = np.abs(computed.astype(np.float64) - a @ b) / (np.abs(a) @ np.abs(b))
    return float(np.max(apart) / ((a.shape[1] + 16) * 2.0**-24))


def cases(form: str, *, rows: int, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the error of every pattern and length d, once as one product and once as a batch of [t, t] products."""
    bits, precision = FORMATS[form]
    dtype = ml_dtypes.bfloat16 if form == "bf16" else np.float32

    @jax.jit
    def one(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

    @jax.jit
    def batch(a: Any, b: Any) -> Any:
        together = jnp.einsum("ptk,pks->pts", a, b, precision=precision, preferred_element_type=jnp.float32)
        return together[-1]

    rng = np.random.default_rng(1)
    for d in lengths:
        for pattern in PATTERNS:
            a, b = operands(pattern, rows, d, bits, rng)
            given = a.astype(dtype), b.astype(dtype)
            for shape, compute in (("product", one), ("batch", batch)):
                stacked = given if shape == "product" else tuple(np.stack([x] * 4) for x in given)
                yield {
                    "shape": shape,
                    "pattern": pattern,
                    "d": d,
                    "error": error_of(np.asarray(compute(*stacked)), a, b),
                }


def measure(*, tiny: bool, to: Path | None = None) -> dict[str, Any]:
    """Measure all formats; returns the content, written to `to` after each of them."""
    device = jax.devices()[0]
    content: dict[str, Any] = {
        "what": "largest error of accumulation over sum |a||b|, in units of (d + 16) 2^-24",
        "device": device.device_kind,
        "assumed": ASSUMED,
        "formats": {},
    }
    sizes: dict[str, Any] = (
        {"rows": 16, "lengths": (64, 300)} if tiny else {"rows": 128, "lengths": (1024, 4096, 16384)}
    )
    for form in FORMATS:
        found = list(cases(form, **sizes))
        worst = max(found, key=lambda case: case["error"])
        content["formats"][form] = {"worst": worst["error"], "at": worst, "cases": found}
        if to is not None:
            write_atomically(to, json.dumps(content, indent=2) + "\n")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="short products, to try the program")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the JSON there, after every format")
    options = parser.parse_args(argv)
    content = measure(tiny=options.tiny, to=options.to)
    worst = ", ".join(f"{form} {found['worst']:.3f}" for form, found in content["formats"].items())
    print(json.dumps(content) if options.to is None else f"worst: {worst}; assumed: {ASSUMED:g}")
    beyond = [form for form, found in content["formats"].items() if found["worst"] > ASSUMED]
    for form in beyond:
        print(f"{form}: {content['formats'][form]['worst']:.2f} exceeds {ASSUMED:g}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
