"""Clip small problems on this device and look at every example's contribution in float64.

usage: python -m dpdist_launch.measure.gpu.zoo --to FILE [--tiny] [--limit SECONDS]

For every case, method and precision, the program that sums a batch is run once for each example alone (the others are
masked): the norm of that sum, taken in float64 on the host, must not exceed C, and must come near C where the gradient
is longer. Of a product, the gradients are known exactly, in float64; of a model they are those of `vmap(grad)` on the
device at the highest precision. The sum over the batch is compared with theirs, clipped in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist.config import Model
from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.models import build, example_loss
from dpdist.program.device_rates import device_rates, faster
from dpdist.run.directory import write_atomically

EXAMPLES = 6
#: Precisions of clipping to try.
PRECISIONS = ("highest", "tensor")
#: Where a gradient is longer than C, the part of C that must be reached by a case of known gradients.
REACHED = 0.9


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss with parameters and a batch; the float64 gradients of its examples, where they are known exactly."""

    name: str
    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    exact: list[dict[str, np.ndarray]] | None = None
    strategies: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("auto", "per_example")
    #: True if the weight of an example is capped by what its terms add up to, so that it stays far below C.
    capped: bool = False


def products(dtype: str) -> Iterator[Case]:
    """Yield losses <x w, g>, whose gradient is x^T g, with factors that round badly."""
    t, m, n = 300, 48, 64
    rng = np.random.default_rng(3)
    for family in ("random", "cancelling", "swamped", "one long row", "all positive"):
        x, g = rng.standard_normal((EXAMPLES, t, m)), rng.standard_normal((EXAMPLES, t, n))
        if family == "cancelling":  # every row pair has nearly its opposite behind it
            x[:, 1::2], g[:, 1::2] = x[:, ::2], -g[:, ::2] * (1 + 2.0**-6 * rng.integers(0, 2, (EXAMPLES, t // 2, 1)))
        elif family == "swamped":  # a long first row, then many that are below its last bit
            x[:, 1:], g[:, 1:] = np.abs(x[:, 1:]) * 2.0**-12, np.abs(g[:, 1:]) * 2.0**-12
        elif family == "one long row":
            x[:, t // 2] *= 300
        elif family == "all positive":
            x, g = np.abs(x), np.abs(g)
        x, g = (np.asarray(jnp.asarray(side, dtype)) for side in (x, g))
        wide = x.astype(np.float64), g.astype(np.float64)
        exact = [{"w": a.T @ b} for a, b in zip(*wide, strict=True)]
        params = {"w": np.zeros((m, n), np.float32)}
        for strategy in ("ghost", "instantiate"):
            yield Case(
                name=f"{family}, {strategy}",
                loss=lambda p, e: jnp.sum((e["x"] @ p["w"].astype(e["x"].dtype)).astype(jnp.float32) * e["g"]),
                params=params,
                batch={"x": x, "g": g.astype(np.float32)},
                exact=exact,
                strategies={"w": strategy},
                methods=("auto",),
                capped=family == "cancelling" and strategy == "ghost",
            )


#: Options of models that are small enough to compile in a moment.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [16]},
    "vit": {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "patch": 4, "image_size": 16},
    "bert": {"width": 32, "depth": 2, "heads": 4, "mlp": 48, "vocabulary": 50, "positions": 12},
    "bit_resnet": {"layers": [1, 1], "channels": [128, 128], "image_size": 32},
    "cnn": {},
}


def model(name: str, dtype: str) -> Iterator[Case]:
    """Yield a small model of `dpdist.models` with random data."""
    rng = np.random.default_rng(4)
    options = MODELS[name] | ({"dtype": dtype} if dtype != "float32" else {})
    columns = {"label": rng.integers(0, 5, EXAMPLES).astype(np.int32)}
    if name == "bert":
        columns["input_ids"] = rng.integers(0, 50, (EXAMPLES, 10)).astype(np.int32)
    else:
        columns["image"] = rng.integers(0, 256, (EXAMPLES, 16, 16, 3)).astype(np.uint8)
    example = {column: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for column, rows in columns.items()}
    built = build(Model(name=name, options=options), example=example, classes=5)
    yield Case(name=name, loss=example_loss(built), params=built.init(jax.random.key(0)), batch=columns)


def cases() -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Yield (format, makes its cases), the most telling first."""
    for form, dtype in (("bf16", "bfloat16"), ("tf32", "float32")):
        yield form, partial(products, dtype)
    for name in MODELS:
        for form, dtype in (("bf16", "bfloat16"), ("tf32", "float32")):
            if (name, dtype) not in {("mlp", "bfloat16"), ("cnn", "bfloat16")}:  # they have no option `dtype`
                yield form, partial(model, name, dtype)


def gradients(case: Case) -> list[dict[str, np.ndarray]]:
    """Return every example's gradient by path, in float64."""
    if case.exact is not None:
        return case.exact
    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.vmap(jax.grad(case.loss), in_axes=(None, 0)))(case.params, case.batch)
    return [_flat(jax.tree.map(lambda leaf, i=i: leaf[i], found)) for i in range(EXAMPLES)]


def _flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64) for path, x in leaves}


def _norm(tree: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree.values())))


def check(case: Case, known: list[dict[str, np.ndarray]], method: str, precision: str) -> dict[str, Any]:
    """Run one program for the batch and for every example alone; return what came out, over C."""
    norms = [_norm(gradient) for gradient in known]
    clip_norm = float(np.clip(np.median(norms), 1e-3, 1e5))
    device = jax.devices()[0]
    extra: dict[str, Any] = {"precision": precision} | ({"strategies": case.strategies} if case.strategies else {})
    prefer = faster(device_rates(device.device_kind, device.platform))
    run = jax.jit(clipped_grad_sum(case.loss, clip_norm=clip_norm, method=method, prefer=prefer, **extra))

    def summed(mask: np.ndarray) -> dict[str, np.ndarray]:
        return _flat(run(case.params, case.batch, mask.astype(np.float32))[0])

    alone = [_norm(summed(np.arange(EXAMPLES) == i)) / clip_norm for i in range(EXAMPLES)]
    weights = [min(1.0, clip_norm / norm) for norm in norms]
    expected = {path: np.sum([w * g[path] for w, g in zip(weights, known, strict=True)], axis=0) for path in known[0]}
    together = summed(np.ones(EXAMPLES))
    apart = _norm({path: together[path] - expected[path] for path in expected}) / _norm(expected)
    longer = [value for value, norm in zip(alone, norms, strict=True) if norm > clip_norm]
    return {"largest": max(alone), "smallest_clipped": min(longer, default=None), "difference": apart}


def zoo(to: Path, *, tiny: bool, limit: float) -> dict[str, Any]:
    """Check all cases until `limit` seconds have passed; returns the content, written to `to` after each check."""
    began = time.monotonic()
    content: dict[str, Any] = {
        "what": "norm of single examples' contributions, in float64, over C; relative difference of the sum",
        "device": jax.devices()[0].device_kind,
        "precisions": list(PRECISIONS),
        "checks": [],
        "complete": False,
    }
    for form, make in list(cases())[:: 2 if tiny else 1][: 2 if tiny else None]:
        for case in make():
            known: list[dict[str, np.ndarray]] | None = None
            for precision in content["precisions"]:
                for method in case.methods:
                    if time.monotonic() - began > limit:
                        return content
                    row: dict[str, Any] = {"case": case.name, "format": form, "precision": precision, "method": method}
                    try:
                        known = known or gradients(case)
                        row |= check(case, known, method, precision)
                        row["ok"] = row["largest"] <= 1.0
                        if case.exact is not None and precision == "highest" and not case.capped:
                            row["ok"] &= (row["smallest_clipped"] or 1.0) >= REACHED
                    except Exception as error:  # one case must not hide the others
                        row |= {"ok": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                    content["checks"].append(row)
                    write_atomically(to, json.dumps(content, indent=2) + "\n")
    content["complete"] = True
    write_atomically(to, json.dumps(content, indent=2) + "\n")
    return content


def main() -> int:
    """Run the program; it fails where an example adds more than C, or a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="the first cases only")
    parser.add_argument("--limit", type=float, default=60.0, help="begin no check after so many seconds (60)")
    options = parser.parse_args()
    content = zoo(options.to, tiny=options.tiny, limit=options.limit)
    checks = content["checks"]
    bad = [row for row in checks if not row["ok"]]
    for row in bad:
        print(json.dumps(row), file=sys.stderr)
    largest = max((row["largest"] for row in checks if "largest" in row), default=float("nan"))
    print(f"{len(checks)} checks, {len(bad)} bad, largest contribution {largest:.7f} C", end="")
    print("" if content["complete"] else "; no time for the rest")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
