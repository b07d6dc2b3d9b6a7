"""Facts about one device, each printed and appended to DIR/facts.jsonl as it is found. usage: facts.py --to DIR [--tiny] [--only ABCDEF]"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

ARGS = argparse.ArgumentParser()
ARGS.add_argument("--to", required=True)
ARGS.add_argument("--tiny", action="store_true")
ARGS.add_argument("--only", default="ABCDEF")
ARGS.add_argument("--repeats", type=int, default=10)
args = ARGS.parse_args()
TINY = args.tiny
BEGAN = time.time()
os.makedirs(args.to, exist_ok=True)
FILE = open(os.path.join(args.to, "facts.jsonl"), "a")
HIGHEST = lax.Precision.HIGHEST
DEVICE = jax.devices()[0]
GPU = DEVICE.platform != "cpu"
TF32 = lax.DotAlgorithmPreset.TF32_TF32_F32 if GPU else HIGHEST  # a CPU refuses it
SECTION, DEADLINE = "", 0.0


class Late(Exception):
    pass


def short(v):
    return float(f"{v:.5g}") if isinstance(v, (float, np.floating)) else v


def fact(name, **values):
    values = {k: short(v) for k, v in values.items()}
    FILE.write(json.dumps({"s": SECTION, "name": name, "at": round(time.time() - BEGAN, 1), **values}, default=str) + "\n")
    FILE.flush()
    print(f"{SECTION} {name}: " + " ".join(f"{k}={v}" for k, v in values.items()), flush=True)


def attempt(name, fn):
    """fn(), its error a fact; False where it failed. Ends the section when its time is over."""
    if time.time() > DEADLINE:
        raise Late(name)
    try:
        fn()
        return True
    except Late:
        raise
    except Exception as error:
        fact(name, failed=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
        return False


def section(letter, limit, fn):
    global SECTION, DEADLINE
    if letter not in args.only:
        return
    SECTION, DEADLINE = letter, time.time() + limit

    def alarm(*_):
        raise Late("hard limit")

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(int(limit + 8))
    began = time.time()
    try:
        fn()
        fact("section", seconds=time.time() - began)
    except Late as late:
        fact("section", seconds=time.time() - began, cut_off_at=str(late))
    except Exception as error:
        fact("section", seconds=time.time() - began, failed=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
    finally:
        signal.alarm(0)


def normal(seed, shape, dtype=jnp.float32, bits=None):
    """Random on the device, rounded to `bits` of explicit significand where given."""
    return _normal(jax.random.key(seed), shape, jnp.dtype(dtype).name, bits)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, bits):
    x = jax.random.normal(key, shape, jnp.float32)
    if bits is not None:
        x = lax.reduce_precision(x, 8, bits)
    return x.astype(dtype)


def seconds(fn, sets, repeats=None):
    """Median seconds of a call. The calls are queued in groups that last long enough, over the input sets in turn."""
    repeats = repeats or args.repeats
    jax.block_until_ready([fn(*s) for s in sets])
    began = time.perf_counter()
    jax.block_until_ready(fn(*sets[0]))
    one = time.perf_counter() - began
    calls = max(1, min(len(sets) * 4, int(0.003 / max(one, 1e-6))))
    times, i = [], 0
    for _ in range(repeats):
        began = time.perf_counter()
        out = None
        for _ in range(calls):
            out = fn(*sets[i % len(sets)])
            i += 1
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / calls)
        if time.time() > DEADLINE:
            break
    return float(np.median(times))


def seconds_in_one(fn, sets, repeats=None):
    """Median seconds of one of the products when one program does all the sets: no launch from Python between them."""
    together = jax.jit(lambda sets: [fn(*s) for s in sets])
    return seconds(lambda sets: together(sets), [(sets,)], repeats) / len(sets)


def words(precision):
    """Operands' dtype and explicit bits, and how to multiply them."""
    return {
        "bf16": (jnp.bfloat16, 7, dict(preferred_element_type=jnp.float32)),
        "tf32": (jnp.float32, 10, dict(precision=TF32, preferred_element_type=jnp.float32)),
        "highest": (jnp.float32, None, dict(precision=HIGHEST)),
        "default": (jnp.float32, None, {}),
        "default-tf32-operands": (jnp.float32, 10, {}),
    }[precision]


# A: accumulation ------------------------------------------------------------------------------------------------------


def swamped_rows(rng, rows, k, where, gram):
    """Row pairs with one product that is large and k - 1 of the other sign below its last bit."""
    at = {"first": 0, "middle": k // 2, "last": k - 1}[where]
    if gram:  # even rows +s, odd rows -s: their products are -s^2
        x = np.ones((rows, k)) * (2.0**-13 * rng.choice([1.9921875, 1.40625, 1.9921875 / 2], (rows, 1)))
        x[1::2] *= -1
        x[:, at] = 1
        return x, None
    a = np.ones((rows, k)) * 2.0 ** rng.integers(-3, 3, (rows, 1))
    b = np.ones((k, rows)) * (-(2.0 ** -rng.integers(23, 28, (1, rows)).astype(float)) * 1.9921875)
    b[at] = 1
    return a, b


#: Operands fit TF32 in `default-tf32-operands`, so that only the accumulation is seen.
PRECISIONS = ("bf16", "tf32", "default-tf32-operands", "highest")


def section_a():
    rng = np.random.default_rng(1)
    ks = [64, 300] if TINY else [1024, 4096, 6304, 16384]
    rows, p, t = (16, 2, 13) if TINY else (256, 32, 197)
    worst = {}
    dots = {}
    for precision in PRECISIONS:
        dtype, bits, kw = words(precision)
        dots[precision] = (
            jax.jit(lambda a, b, kw=kw: jnp.matmul(a, b, **kw)),
            jax.jit(lambda x, kw=kw: jnp.einsum("ptk,psk->pts", x, x, **kw)),
        )

    def check(label, precision, k, computed, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        true, weight = a @ b, np.abs(a) @ np.abs(b)
        error = (np.asarray(computed, np.float64) - true) / np.where(weight == 0, 1, weight)
        unit = k * 2.0**-24
        at = float(np.max(np.abs(error))) / unit
        fact(label, precision=precision, k=k, ulps_per_product=at, bias=float(np.mean(error)) / unit,
             of_gamma=at * k / (4 * (k + 16)))
        key = (precision, label)
        worst[key] = max(worst.get(key, 0.0), at * k / (4 * (k + 16)))

    def as_words(x, dtype, bits):
        x = np.asarray(x, np.float32)
        if bits == 7:
            return x.astype(ml_dtypes.bfloat16)
        if bits == 10:
            return tf32_rounded(x)
        return x

    def one(precision, k, pattern):
        dtype, bits, _ = words(precision)
        if pattern.startswith("swamped"):
            a, b = swamped_rows(rng, rows, k, pattern[8:], False)
        else:
            a, b = rng.standard_normal((rows, k), np.float32), rng.standard_normal((k, rows), np.float32)
            if pattern == "positive":
                a, b = np.abs(a), np.abs(b)
        a, b = as_words(a, dtype, bits), as_words(b, dtype, bits)
        computed = np.asarray(dots[precision][0](a, b))
        check(f"matmul {pattern}", precision, k, computed[:64], a[:64], b)

    def batched(precision, k, pattern):
        dtype, bits, _ = words(precision)
        few = min(p, 2)
        if pattern.startswith("swamped"):
            x, _ = swamped_rows(rng, t, k, pattern[8:], True)
            x = jnp.broadcast_to(as_words(x, dtype, bits), (p, t, k))
        else:
            x = normal(k + 7, (p, t, k), dtype, bits)
            x = jnp.abs(x) if pattern == "positive" else x
        computed = np.asarray(dots[precision][1](x)[:few])
        x = np.asarray(x[:few]).astype(np.float64)
        if bits is not None and pattern == "signs":
            same = np.array_equal(x.astype(np.float32), np.asarray(as_words(x, dtype, bits), np.float32))
            if not same:
                fact("gram operands do not fit the format", precision=precision)
        a = np.concatenate([x[i] for i in range(1)])
        check(f"gram {pattern}", precision, k, computed[0], a, a.T)

    patterns = ("positive", "swamped first", "swamped middle", "swamped last", "signs")
    for precision in PRECISIONS:
        for k in ks:
            for pattern in patterns:
                attempt(f"matmul {precision} {k} {pattern}", lambda: one(precision, k, pattern))
            for pattern in patterns:
                attempt(f"gram {precision} {k} {pattern}", lambda: batched(precision, k, pattern))
        fact("worst share of gamma=4(K+16)2^-24", precision=precision,
             share=max((v for (q, _), v in worst.items() if q == precision), default=None),
             of=max(((v, label) for (q, label), v in worst.items() if q == precision), default=(0, ""))[1])


def tf32_rounded(x):
    """To nearest, ties to even, 10 explicit bits, in numpy."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + ((bits >> 13) & 1)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


# B: elision -----------------------------------------------------------------------------------------------------------


def section_b():
    n = 64 if TINY else 1024
    rng = np.random.default_rng(2)
    x = rng.standard_normal((n, n), np.float32)
    x[:8] *= 2.0 ** rng.integers(-60, 60, (8, n))
    y = rng.standard_normal((n, n), np.float32)
    identity = np.eye(n, dtype=np.float32)
    want = {"bf16": x.astype(ml_dtypes.bfloat16).astype(np.float32), "tf32": tf32_rounded(x)}
    ways = {
        "casts bf16": (lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), want["bf16"]),
        "reduce_precision 7": (lambda v: lax.reduce_precision(v, 8, 7), want["bf16"]),
        "reduce_precision 10": (lambda v: lax.reduce_precision(v, 8, 10), want["tf32"]),
    }
    for name, (way, rounded) in ways.items():

        def told(got, expected, where):
            got = np.asarray(got)
            fact(f"{name} {where}", kept=bool(np.array_equal(got, expected)),
                 share_equal=float(np.mean(got == expected)), unrounded=bool(np.array_equal(got, x) if where == "alone" else False))

        attempt(f"{name} alone", lambda: told(jax.jit(way)(x), rounded, "alone"))
        # (v - rounded) is 0 where the pair of casts was taken out.
        attempt(f"{name} fused", lambda: told(jax.jit(lambda v: (v - way(v)) * 1024)(x), (x - rounded) * 1024, "in a fusion"))
        attempt(f"{name} fused 2", lambda: told(jax.jit(lambda v, w: way(v * w) - 0.5 * w)(x, np.float32(2) + 0 * y),
                                                  (2 * rounded - np.float32(1)).astype(np.float32), "after a product"))

        def dot():
            eye = jnp.asarray(identity)
            small, rows = x[8:], rounded[8:]
            got = jax.jit(lambda v, e: jnp.matmul(way(v), e, precision=HIGHEST))(small, eye)
            told(got, rows, "into HIGHEST dot")
            got = jax.jit(lambda v, e: jnp.matmul(way(v), e))(small, eye)
            told(got, rows, "into DEFAULT dot")

        attempt(f"{name} dot", dot)

    def default():
        a, b = rng.standard_normal((n, n), np.float32), rng.standard_normal((n, n), np.float32)
        true = a.astype(np.float64) @ b.astype(np.float64)
        for precision in ("default", "tf32", "highest", "bf16"):
            kw = words(precision)[2]
            operands = (a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)) if precision == "bf16" else (a, b)
            got = np.asarray(jax.jit(lambda p, q: jnp.matmul(p, q, **kw))(*operands), np.float64)
            fact("f32 matmul error", precision=precision, relative=float(np.linalg.norm(got - true) / np.linalg.norm(true)))
        small = x[8:]
        seen = np.asarray(jax.jit(lambda v, e: jnp.matmul(v, e))(small, identity))
        seen32 = np.asarray(jax.jit(lambda v, e: jnp.matmul(v, e, precision=TF32))(small, identity))
        for name, s in (("default", seen), ("tf32", seen32)):
            fact("operands that a float32 dot sees", precision=name, unrounded=bool(np.array_equal(s, small)),
                 nearest_tf32=bool(np.array_equal(s, tf32_rounded(small))),
                 truncated_tf32=bool(np.array_equal(s, (small.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))),
                 nearest_bf16=bool(np.array_equal(s, small.astype(ml_dtypes.bfloat16).astype(np.float32))))

    attempt("default", default)


# C: rates -------------------------------------------------------------------------------------------------------------


def section_c():
    p, t, m, n = (2, 13, 16, 32) if TINY else (32, 197, 768, 3072)
    joint = lambda kw: lambda a, g: jnp.einsum("ptm,ptn->mn", a, g, **kw)
    each = lambda kw: lambda a, g: jnp.einsum("ptm,ptn->pmn", a, g, **kw)
    gram = lambda kw: lambda x: jnp.einsum("ptk,psk->pts", x, x, **kw)

    def timed(name, fn, sets, flops, moved, one=True, **more):
        fn = jax.jit(fn)
        single = seconds(fn, sets)
        inside = seconds_in_one(fn, sets) if one else single
        best = min(single, inside)
        fact(name, us=inside * 1e6, us_calls=single * 1e6, tflops=flops / best / 1e12, gbps=moved / best / 1e9, **more)

    def bandwidth():
        size = 1 << (16 if TINY else 28)
        sets = [(normal(i, (size,)), normal(9 + i, (size,))) for i in range(2)]
        timed("copy (negate) f32", lambda x, y: -x, sets, size, 8 * size, one=False)
        timed("add f32", lambda x, y: x + y, sets, size, 12 * size, one=False)

    def square(precision, size):
        dtype, bits, kw = words(precision)
        sets = [(normal(i, (size, size), dtype, bits), normal(5 + i, (size, size), dtype, bits)) for i in range(2)]
        timed(f"square {size}", lambda a, b: jnp.matmul(a, b, **kw), sets, 2 * size**3, 0, one=False, precision=precision)

    def square64(size):
        with jax.enable_x64(True):
            sets = [(normal(i, (size, size), jnp.float64), normal(5 + i, (size, size), jnp.float64)) for i in range(2)]
            timed(f"square {size}", jnp.matmul, sets, 2 * size**3, 0, one=False, precision="f64")

    def pairs(p, t, dtype, bits, count):
        return [(normal(2 * i, (p, t, m), dtype, bits), normal(2 * i + 1, (p, t, n), dtype, bits)) for i in range(count)]

    def products(precision, p, t, label, count=4, per_example=True):
        dtype, bits, kw = words(precision)
        sets, flops, width = pairs(p, t, dtype, bits, count), 2 * p * t * m * n, 2 if precision == "bf16" else 4
        read = width * p * t * (m + n)
        attempt("joint", lambda: timed(f"joint {label}", joint(kw), sets, flops, read + 4 * m * n, precision=precision))
        if per_example:
            attempt("each", lambda: timed(f"per-example {label}", each(kw), sets[:2], flops, read + 4 * p * m * n, precision=precision))

    def grams(precision, p, t, k, label, count=8):
        dtype, bits, kw = words(precision)
        sets = [(normal(i, (p, t, k), dtype, bits),) for i in range(count)]
        width = 2 if precision == "bf16" else 4
        timed(f"gram {label} k={k}", gram(kw), sets, 2 * p * t * t * k, width * p * t * k + 4 * p * t * t, precision=precision)

    def gram64(p, t, k, label):
        with jax.enable_x64(True):
            sets = [(normal(i, (p, t, k)),) for i in range(3)]
            fn = lambda x: jnp.einsum("ptk,psk->pts", x.astype(jnp.float64), x.astype(jnp.float64))
            timed(f"gram {label} k={k}", fn, sets, 2 * p * t * t * k, 4 * p * t * k + 8 * p * t * t, one=False, precision="f64")

    attempt("bandwidth", bandwidth)
    for precision, size in (("bf16", 8192), ("tf32", 8192), ("highest", 4096)):
        attempt(f"square {precision}", lambda: square(precision, 64 if TINY else size))
    attempt("square f64", lambda: square64(64 if TINY else 4096))
    shape = f"p={p} t={t}"
    for precision in ("bf16", "tf32", "highest"):
        attempt(f"products {precision}", lambda: products(precision, p, t, shape))
    padded = 16 if TINY else 256
    for precision in ("bf16", "tf32"):
        for length in (t, padded):
            for k in (m, n):
                attempt(f"gram {precision} {length} {k}", lambda: grams(precision, p, length, k, f"p={p} t={length}"))
    for k in (m, n):
        attempt(f"gram f64 {k}", lambda: gram64(p, t, k, shape))
    p2, t2 = (2, 16) if TINY else (8, 1024)
    for precision in ("bf16", "tf32"):
        attempt("gpt joint", lambda: products(precision, p2, t2, f"p={p2} t={t2}", per_example=False))
        attempt("gpt gram", lambda: grams(precision, p2, t2, m, f"p={p2} t={t2}", count=4))
    attempt("gpt gram f64", lambda: gram64(p2, t2, m, f"p={p2} t={t2}"))


# D: one layer ---------------------------------------------------------------------------------------------------------


def gamma(d):
    return (d + 16) * 4 * 2.0**-24


def eta(d):
    return (d + 16) * 2.0**-126


def tensor_bound(a, g, kw):
    """The a-posteriori bound of DESIGN.md section 5: (estimate of norm^2, bound of the whole contribution / c)."""
    t, m, n = a.shape[1], a.shape[2], g.shape[2]
    p32 = jnp.einsum("ptk,psk->pts", a, a, **kw)
    q32 = jnp.einsum("ptk,psk->pts", g, g, **kw)
    p, q = p32.astype(jnp.float64), q32.astype(jnp.float64)
    alpha = jnp.sqrt((jnp.diagonal(p, 0, 1, 2) + eta(m)) / (1 - gamma(m)))
    beta = jnp.sqrt((jnp.diagonal(q, 0, 1, 2) + eta(n)) / (1 - gamma(n)))
    square = jnp.sum(p * q, (1, 2))
    left = jnp.sum(jnp.abs(p) * beta[:, :, None] * beta[:, None, :], (1, 2))
    right = jnp.sum(jnp.abs(q) * alpha[:, :, None] * alpha[:, None, :], (1, 2))
    terms = jnp.sum(alpha * beta, 1)
    low = 2 * (eta(m) * t * jnp.sum(beta**2, 1) + eta(n) * t * jnp.sum(alpha**2, 1) + eta(m) * eta(n) * t * t)
    error = gamma(m) * right + gamma(n) * left + gamma(m) * gamma(n) * terms**2 + low
    norm = jnp.sqrt((jnp.maximum(square, 0) + error) * (1 + 2.0**-30))
    fold = 2.0 ** (-8 if a.dtype == jnp.bfloat16 else -11) * jnp.sqrt(left + gamma(m) * terms**2 + low)
    accumulate = gamma(a.shape[0] * t) * 1.01 * terms
    absolute = math.sqrt(n) * 2.0**-126 * jnp.sum(alpha, 1)
    return square, norm + fold + accumulate, absolute


def squares_kernel(a, g, tf32, bm, bn, bk, warps, stages, masked):
    """Per example sum of squares of A_i^T G_i, tile by tile in registers. a [p, t, m], g [p, t, n] -> [p] float32 sums by tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    p, t, m = a.shape
    n = g.shape[2]
    steps = -(-t // bk)
    how = dict(precision=TF32) if tf32 else {}

    def kernel(a_ref, g_ref, out_ref):
        i, j, l = pl.program_id(0), pl.program_id(1), pl.program_id(2)

        def body(k, acc):
            if masked:
                mask = (k * bk + jnp.arange(bk) < t)[:, None]
                x = plt.load(a_ref.at[i, pl.ds(k * bk, bk), pl.ds(j * bm, bm)], mask=jnp.broadcast_to(mask, (bk, bm)), other=0.0)
                y = plt.load(g_ref.at[i, pl.ds(k * bk, bk), pl.ds(l * bn, bn)], mask=jnp.broadcast_to(mask, (bk, bn)), other=0.0)
            else:
                x, y = a_ref[0, pl.ds(k * bk, bk), :], g_ref[0, pl.ds(k * bk, bk), :]
            return acc + lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32, **how)

        acc = lax.fori_loop(0, steps, body, jnp.zeros((bm, bn), jnp.float32))
        out_ref[0, 0, 0] = jnp.sum(acc * acc)

    if masked:
        specs = [pl.BlockSpec(a.shape, lambda i, j, l: (0, 0, 0)), pl.BlockSpec(g.shape, lambda i, j, l: (0, 0, 0))]
    else:
        pad = steps * bk - t
        a, g = (jnp.pad(v, ((0, 0), (0, pad), (0, 0))) for v in (a, g))
        specs = [pl.BlockSpec((1, steps * bk, bm), lambda i, j, l: (i, 0, j)), pl.BlockSpec((1, steps * bk, bn), lambda i, j, l: (i, 0, l))]
    tiles = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((p, m // bm, n // bn), jnp.float32),
        grid=(p, m // bm, n // bn),
        in_specs=specs,
        out_specs=pl.BlockSpec((1, 1, 1), lambda i, j, l: (i, j, l)),
        interpret=INTERPRET,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
    )(a, g)
    return tiles


INTERPRET = not GPU


def one_layer(precision, shape):
    """name -> f(a, g) -> (joint sum, squares of the norms); to be traced under enable_x64."""
    p, t, m, n = shape
    dtype, bits, kw = words(precision)
    joint = lambda a, w: jnp.einsum("ptm,ptn->mn", a, w, **kw)

    def factor(square):
        return jnp.minimum(1.0, 1.0 / jnp.sqrt(square)).astype(jnp.float32)

    def folded(c, g):
        w = lax.reduce_precision(c[:, None, None] * g.astype(jnp.float32), 8, bits)
        return w.astype(dtype)

    def plain(a, g):
        return joint(a, g), None

    def ghost(a, g):
        square, bound, absolute = tensor_bound(a, g, kw)
        c = (jnp.minimum(1.0, (1.0 - absolute) / bound) * (1 - 2.0**-22)).astype(jnp.float32)
        return joint(a, folded(c, g)), square

    def instantiate(stored):
        def fn(a, g):
            x = jnp.einsum("ptm,ptn->pmn", a, g, **kw).astype(stored)
            x = lax.optimization_barrier(x)
            square = jnp.sum(jnp.square(x.astype(jnp.float32)), (1, 2))
            c = factor(square)
            return jnp.sum(c[:, None, None] * x.astype(jnp.float32), 0), square

        return fn

    def today(a, g):
        a64, g64 = a.astype(jnp.float64), g.astype(jnp.float64)
        square = jnp.sum(jnp.einsum("ptk,psk->pts", a64, a64) * jnp.einsum("ptk,psk->pts", g64, g64), (1, 2))
        w = factor(square)[:, None, None] * g.astype(jnp.float32)
        return jnp.einsum("ptm,ptn->mn", a.astype(jnp.float32), w, precision=HIGHEST), square

    def pallas(bm, bn, bk, warps, stages, masked):
        def fn(a, g):
            tiles = squares_kernel(a, g, precision == "tf32", bm, bn, bk, warps, stages, masked)
            square = jnp.sum(tiles, (1, 2))
            return joint(a, folded(factor(square), g)), square

        return fn

    ways = {"plain": plain, "tensor ghost": ghost, "instantiate f32": instantiate(jnp.float32),
            "instantiate bf16-stored": instantiate(jnp.bfloat16), "today f64+HIGHEST": today}  # fmt: skip
    if TINY:
        blocks = [(16, 16, 16, 4, 2, False), (16, 16, 16, 4, 2, True)]
    elif precision == "bf16":
        blocks = [(128, 128, 64, 8, 3, False), (128, 128, 64, 4, 3, False), (128, 256, 64, 8, 3, False), (128, 128, 64, 8, 3, True)]
    else:
        blocks = [(128, 128, 32, 8, 3, False), (128, 128, 32, 4, 3, False), (128, 256, 32, 8, 3, False), (128, 128, 32, 8, 3, True)]
    for b in blocks:
        ways[f"pallas {b[0]}x{b[1]}x{b[2]} w{b[3]} s{b[4]} {'masked' if b[5] else 'padded'}"] = pallas(*b)
    return ways


def section_d():
    p, t, m, n = shape = (2, 13, 32, 32) if TINY else (32, 197, 768, 3072)
    for precision in ("bf16", "tf32"):
        dtype, bits, _ = words(precision)
        sets = [(normal(2 * i, (p, t, m), dtype, bits), normal(2 * i + 1, (p, t, n), dtype, bits)) for i in range(3)]
        # The float64 reference of two examples, on the host.
        a, g = (np.asarray(v[:2]).astype(np.float64) for v in sets[0])
        reference = np.array([np.sum((a[i].T @ g[i]) ** 2) for i in range(2)])
        base = [None]
        compiled = {}

        def one(name, way):
            with jax.enable_x64(not name.startswith("pallas")):  # index arithmetic of a kernel stays in 32 bits
                fn = jax.jit(way)
                compiled[name] = fn
                square = fn(*sets[0])[1]
                error = None if square is None else float(np.max(np.abs(np.asarray(square[:2], np.float64) / reference - 1)))
                took = seconds(fn, sets)
            if name == "plain":
                base[0] = took
            more = {} if error is None else {"norm2_error": error}
            fact(f"layer {name}", precision=precision, us=took * 1e6, over_plain=(took - base[0]) / base[0] if base[0] else None, **more)

        for name, way in one_layer(precision, shape).items():
            attempt(f"layer {precision} {name}", lambda: one(name, way))

        def again():  # the spread of the baseline
            with jax.enable_x64(True):
                fact("layer plain again", precision=precision, us=seconds(compiled["plain"], sets) * 1e6)
                a, g = sets[0]
                kw = words(precision)[2]
                _, bound, _ = jax.jit(lambda a, g: tensor_bound(a, g, kw))(a, g)
                fact("ghost: bound over norm", precision=precision,
                     ratio=float(np.median(np.asarray(bound[:2]) / np.sqrt(reference))))

        attempt("again", again)


# E: noise -------------------------------------------------------------------------------------------------------------


def ordered(x):
    bits = x.view(np.int64 if x.dtype == np.float64 else np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & np.int64(0x7FFFFFFFFFFFFFFF if x.dtype == np.float64 else 0x7FFFFFFF)), bits)


def section_e():
    d = 1 << 18 if TINY else 86_000_000
    block = 1 << 16 if TINY else 1 << 22
    blocks = -(-d // block)

    def median(fn):
        jax.block_until_ready(fn())
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            jax.block_until_ready(fn())
            times.append(time.perf_counter() - began)
            if time.time() > DEADLINE:
                break
        return float(np.median(times))

    with jax.enable_x64(True):
        keys = list(jax.random.split(jax.random.key(3), blocks))

        def bits():
            count = 10_000 if TINY else 1_000_000
            for dtype in (jnp.float64, jnp.float32):
                draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (count,), dtype))
                found = {}
                for place in (DEVICE, jax.devices("cpu")[0]):
                    with jax.default_device(place):
                        found[place.platform] = np.asarray(draw(np.uint32(12345)))
                    value = found[place.platform]
                    assert value.dtype == dtype
                    fact(f"normal {jnp.dtype(dtype).name} bits", device=place.platform, sha256=hashlib.sha256(value.tobytes()).hexdigest()[:16])
                values = list(found.values())
                x, y = values[0], values[-1]
                apart = np.abs(ordered(x) - ordered(y))
                fact(f"normal {jnp.dtype(dtype).name} device against cpu", compared=len(values) > 1, equal=bool(np.array_equal(x, y)),
                     differ=float(np.mean(x != y)), largest_ulps=int(apart.max()), largest_difference=float(np.max(np.abs(x - y))))

        def looped(name, fn):
            compiled = jax.jit(fn)
            took = median(lambda: [compiled(k) for k in keys])
            fact(name, ms=took * 1e3, d=blocks * block, block=block, ns_a_coordinate=took / (blocks * block) * 1e9)

        def three(key):
            k = jax.random.split(key, 3)
            z = lambda i, s: jnp.rint(jax.random.normal(k[i], (block,), jnp.float64) * s).astype(jnp.int64)
            return z(0, 2.0**36) + z(1, 2.0**36) + z(2, 2.0**20)

        attempt("bits", bits)
        attempt("normal f64", lambda: looped("normal float64", lambda k: jax.random.normal(k, (block,), jnp.float64)))
        attempt("normal f32", lambda: looped("normal float32", lambda k: jax.random.normal(k, (block,), jnp.float32)))
        attempt("three", lambda: looped("integer noise: 3 float64 normals", three))

        def accumulating(name, dtype, fn):
            add = jax.jit(fn, donate_argnums=0)
            acc = [jnp.zeros((d,), dtype)]
            xs = [normal(i, (d,)) for i in range(2)]
            turn = [0]

            def run():
                turn[0] += 1
                acc[0] = add(acc[0], xs[turn[0] % 2])
                return acc[0]

            took = median(run)
            wide = jnp.dtype(dtype).itemsize
            fact(name, ms=took * 1e3, d=d, gbps=d * (4 + 2 * wide) / took / 1e9)

        attempt("int64", lambda: accumulating("round and add to int64", jnp.int64,
                                              lambda acc, x: acc + jnp.rint(x.astype(jnp.float64) * 2.0**40).astype(jnp.int64)))
        attempt("int64 b", lambda: accumulating("round in f32 and add to int64", jnp.int64,
                                                lambda acc, x: acc + jnp.rint(x * np.float32(2.0**40)).astype(jnp.int64)))
        attempt("f32", lambda: accumulating("add to float32", jnp.float32, lambda acc, x: acc + x))


# F: determinism -------------------------------------------------------------------------------------------------------


def section_f():
    times = 3 if TINY else 20

    def same(name, fn, *inputs):
        fn = jax.jit(fn)
        seen = {}
        for _ in range(times):
            digest = hashlib.sha256(np.asarray(fn(*inputs)).tobytes()).hexdigest()[:12]
            seen[digest] = seen.get(digest, 0) + 1
        fact(name, runs=times, distinct=len(seen), equal=len(seen) == 1)

    p, t, m, n = (2, 13, 16, 32) if TINY else (32, 197, 768, 3072)
    for precision in ("bf16", "tf32", "highest"):
        dtype, bits, kw = words(precision)
        a, g = normal(0, (p, t, m), dtype, bits), normal(1, (p, t, n), dtype, bits)
        attempt("joint", lambda: same(f"joint product {precision}", lambda a, g: jnp.einsum("ptm,ptn->mn", a, g, **kw), a, g))
    count, vocabulary, width = (64, 10, 8) if TINY else (8192, 1000, 256)
    ids = jax.random.randint(jax.random.key(5), (count,), 0, vocabulary)
    rows = normal(6, (count, width))
    attempt("scatter", lambda: same("scatter-add (embedding)", lambda i, r: jnp.zeros((vocabulary, width)).at[i].add(r), ids, rows))
    attempt("segment", lambda: same("segment_sum", lambda i, r: jax.ops.segment_sum(r, i, vocabulary), ids, rows))
    image = (2, 8, 8, 4) if TINY else (32, 56, 56, 64)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, dy = normal(7, image, dtype), normal(8, image, dtype)
        kernel = normal(9, (3, 3, image[3], image[3]), dtype)

        def convolution(x, w):
            return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        attempt("convolution", lambda: same(f"convolution weight gradient {jnp.dtype(dtype).name}",
                                            lambda x, w, dy: jax.vjp(lambda w: convolution(x, w), w)[1](dy)[0].astype(jnp.float32), x, kernel, dy))


def summary():
    """What is worth a look, in few characters."""
    lines = [json.loads(line) for line in open(os.path.join(args.to, "facts.jsonl"))]
    print("== facts, compact (A: worst |error| / sum|a||b| in K 2^-24, by K; assumed 4)")
    table = {}
    for f in lines:
        if f["s"] == "A" and "ulps_per_product" in f:
            table.setdefault((f["precision"], f["name"]), {})[f["k"]] = f["ulps_per_product"]
    for (precision, name), by_k in table.items():
        print("A", precision, name, " ".join(f"{k}:{v:.2g}" for k, v in by_k.items()))
    for f in lines:
        if f["s"] == "A" and "ulps_per_product" in f:
            continue
        drop = {"s", "name", "at", "d", "block", "us_calls", "ns_a_coordinate", "runs", "of", "compared"} | ({"gbps"} if "gram" in f["name"] or "joint" in f["name"] else set())
        if f.get("kept") is True:
            drop |= {"share_equal", "unrounded"}
        rest = {k: v for k, v in f.items() if k not in drop and not (k == "gbps" and v == 0)}
        print(f["s"], f["name"].replace("reduce_precision", "rp") + ":", " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rest.items())[:170])


if __name__ == "__main__":
    SECTION = "0"
    fact("device", kind=DEVICE.device_kind, platform=DEVICE.platform, jax=jax.__version__, python=sys.version.split()[0])
    for letter, limit, fn in (("A", 26, section_a), ("B", 8, section_b), ("C", 24, section_c), ("D", 24, section_d), ("E", 12, section_e), ("F", 8, section_f)):
        section(letter, limit, fn)
    summary()
