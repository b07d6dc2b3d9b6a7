"""Every clipping method on many kinds of losses, against one example after the other in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from test_clipping import clipped, flat, one_by_one
from zoo import EXAMPLES, ZOO, Case, mixed_precision, normal

from dpdist.mechanism.clipping import UnsupportedLossError, clipped_grad_sum
from dpdist.mechanism.clipping.norms import Product, Side, squared_norm
from dpdist.mechanism.clipping.paths import trainable
from dpdist.program.gradients import choose_strategies

#: Method, strategies, and the relative error allowed: ghost, forced on long products, has a wider margin.
WAYS = {
    "bookkeeping": ("bookkeeping", {}, 1e-5),
    "ghost": ("ghost", {}, 1e-5),
    "auto": ("auto", {}, 1e-5),
    "per_example": ("per_example", {}, 1e-5),
    "all ghost": ("auto", {"*": "ghost"}, 4e-5),
    "all instantiated": ("auto", {"*": "instantiate"}, 1e-5),
}
#: In `per_example`, a NaN of one example reaches all others through the gradient of such a kernel.
GROUPED = ("grouped", "depthwise, valid", "channels first", "two group counts", "linen")
MASK = np.array([1, 1, 0, 1, 1, 1], np.float32)


@cache
def reference(name: str) -> tuple[Case, np.ndarray, np.ndarray, float]:
    """One loss of the zoo, its gradients and norms in float64, and a C that clips half of the examples."""
    loss_fn, params, batch = ZOO[name]()
    gradients, norms = one_by_one(loss_fn, params, batch, EXAMPLES)
    return (loss_fn, params, batch), gradients, norms, float(np.median(norms))


def methods(name: str, way: str) -> Any:
    (loss_fn, _, _), _, _, clip_norm = reference(name)
    method, strategies, _ = WAYS[way]
    return clipped_grad_sum(loss_fn, clip_norm=clip_norm, method=method, strategies=strategies)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_sums_and_norms_are_the_references(name: str, way: str) -> None:
    """Masked; with a NaN in one example, if it can hold one; and with all examples masked."""
    if way == "per_example" and name in GROUPED:
        loss_fn, params, batch = ZOO[name]()
        with pytest.raises(UnsupportedLossError, match=r"^conv_general_dilated at .*use training.clipping=auto"):
            clipped_grad_sum(loss_fn, clip_norm=1.0, method=way)(params, batch, MASK)
        return
    (_, params, batch), gradients, expected_norms, clip_norm = reference(name)
    function = jax.jit(methods(name, way))
    tolerance = WAYS[way][2]

    def check(batch: Any, mask: np.ndarray, used: np.ndarray) -> None:
        sums, norms = function(params, batch, mask)
        assert jax.tree.structure(sums) == jax.tree.structure(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {np.dtype(np.float32)}
        expected = clipped(gradients, used, clip_norm)
        assert np.linalg.norm(flat(sums) - expected) <= tolerance * np.linalg.norm(expected)
        assert np.abs(np.asarray(norms)[used > 0] / expected_norms[used > 0] - 1).max(initial=0) < 1e-5

    check(batch, MASK, MASK)
    check(batch, np.zeros(EXAMPLES, np.float32), np.zeros(EXAMPLES))
    if any(np.issubdtype(column.dtype, np.floating) for column in batch.values()):
        bad = {name: column.copy() for name, column in batch.items()}
        for column in bad.values():
            if np.issubdtype(column.dtype, np.floating):
                column[3] = np.nan
        check(bad, MASK, MASK * (np.arange(EXAMPLES) != 3))


@pytest.mark.parametrize("way", ["bookkeeping", "ghost", "all ghost"])
@pytest.mark.parametrize("name", ["tied embeddings", "grouped", "scan", "nnx attention"])
def test_no_example_adds_more_than_the_clipping_norm(name: str, way: str) -> None:
    (_, params, batch), _, norms, clip_norm = reference(name)
    function = jax.jit(methods(name, way))
    for i in range(EXAMPLES):
        contribution = np.linalg.norm(flat(function(params, batch, np.eye(EXAMPLES, dtype=np.float32)[i])[0]))
        assert contribution <= clip_norm
        assert contribution > min(clip_norm, norms[i]) * (1 - 5e-5)


@pytest.mark.parametrize("way", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("name", ["tied embeddings", "weight standardisation", "scan, remat, reversed", "linen"])
def test_devices_sum_their_own_examples(name: str, way: str) -> None:
    (_, params, batch), gradients, _, clip_norm = reference(name)
    rows = np.array([0, 1, 2, 3, 4, 5, 0, 2])
    mask = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.float32)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    shares = jax.shard_map(
        lambda *a: jax.tree.map(lambda s: s[None], methods(name, way)(*a)[0]),
        mesh=mesh,
        check_vma=False,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    sums = jax.jit(shares)(params, {k: v[rows] for k, v in batch.items()}, mask)
    expected = clipped(gradients[rows], mask, clip_norm)
    found = np.concatenate([np.asarray(leaf, np.float64).sum(axis=0).ravel() for leaf in jax.tree.leaves(sums)])
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_zeros_add_zeros(way: str) -> None:
    method, strategies, _ = WAYS[way]
    function = clipped_grad_sum(
        lambda p, e: jnp.sum((e["x"] @ p["w"]) ** 2), clip_norm=1.0, method=method, strategies=strategies
    )
    x = normal(1, 4, 3, 5)
    x[1:3] = 0
    params = {"w": normal(2, 5, 2)}
    sums, norms = function(params, {"x": x}, np.ones(4, np.float32))
    alone, _ = function(params, {"x": x[[0, 3]]}, np.ones(2, np.float32))
    assert np.allclose(sums["w"], alone["w"], rtol=1e-6)
    assert np.array_equal(np.asarray(norms)[1:3], np.zeros(2))
    assert not function(params, {"x": x}, np.array([0, 1, 1, 0], np.float32))[0]["w"].any()


def test_strategies_are_what_the_uses_allow() -> None:
    def strategies(name: str) -> dict[str, str]:
        (loss_fn, params, batch), *_ = reference(name)
        example = jax.tree.map(lambda x: x[0], batch)
        leaves = choose_strategies(loss_fn, params, example, strategies={"*": "ghost"})
        return {leaf.path: leaf.reason or leaf.strategy for leaf in leaves}

    assert strategies("tied embeddings") == {"table": "ghost", "w": "ghost"}
    assert strategies("scan") == {"b": "no ghost norm for its use in add", "shared": "ghost", "w": "ghost"}
    assert strategies("experts") == {"down": "ghost", "up": "ghost"}
    assert strategies("slices")["stack"] == strategies("slices")["halves"] == strategies("slices")["clamped"] == "ghost"
    assert strategies("slices")["sliding"] == "it is used in parts that overlap"
    assert strategies("low rank")["w"] == "no ghost norm for its use in dot_general"
    assert strategies("two group counts")["kernel"] == "its uses divide it into rows and columns differently"
    assert strategies("reshaped")["w"] == "its uses divide it into rows and columns differently"
    assert strategies("odd corners")["unused"] == "no example's loss depends on it"
    assert strategies("own derivatives")["w"] == "no ghost norm for its use in custom_vjp_call"


def cancelling(scale: float, nudge: float = 2**-22) -> tuple[np.ndarray, np.ndarray]:
    """Return factors [t, m], [t, n] whose outer products nearly cancel, too much for float32 inner products."""
    random = np.random.default_rng(0)
    a, g = random.normal(size=(64, 32)) * scale, random.normal(size=(64, 48)) * scale
    a, g = a.astype(np.float32), g.astype(np.float32)
    return np.concatenate([a, a]), np.concatenate([g * np.float32(1 + nudge), -g])


def test_under_cancellation_the_norm_is_still_bounded() -> None:
    """The plain float32 result is negative here, so the example would not be clipped."""
    a, g = cancelling(10.0)
    naive = np.asarray(jnp.sum((jnp.asarray(a) @ a.T) * (jnp.asarray(g) @ g.T)))
    true = float(np.sum((a.astype(np.float64).T @ g.astype(np.float64)) ** 2))
    assert naive < 0 < true
    square = float(squared_norm([Product(Side(jnp.asarray(a)[None], False), Side(jnp.asarray(g)[None], False))])[0])
    terms = float(np.sum(np.linalg.norm(a, axis=1) * np.linalg.norm(g, axis=1)))
    assert true * (1 - 1e-6) <= square <= true * (1 + 1e-6) + 1e-13 * terms**2 < 0.01 * abs(naive)

    clip_norm = 1e-3 * np.sqrt(true)
    params, batch = {"w": np.zeros((32, 48), np.float32)}, {"a": a[None], "g": g[None]}
    for strategy in ("ghost", "instantiate"):
        function = clipped_grad_sum(
            lambda p, e: jnp.sum((e["a"] @ p["w"]) * e["g"]),
            clip_norm=clip_norm,
            method="bookkeeping",
            strategies={"w": strategy},
        )
        sums, _ = jax.jit(function)(params, batch, np.ones(1, np.float32))
        assert np.linalg.norm(flat(sums)) <= clip_norm, strategy


def test_inner_products_are_taken_in_float64() -> None:
    """In float32 the error is many times the sum; in float64 it is less than a tenth, on the safe side."""
    a, g = cancelling(10.0, 2**-16)
    naive = float(jnp.sum((jnp.asarray(a) @ a.T) * (jnp.asarray(g) @ g.T)))
    true = float(np.sum((a.astype(np.float64).T @ g.astype(np.float64)) ** 2))
    assert abs(naive - true) > 10 * true
    square = float(squared_norm([Product(Side(jnp.asarray(a)[None], False), Side(jnp.asarray(g)[None], False))])[0])
    assert true * (1 - 1e-6) <= square <= true * 1.1


def test_the_rounding_of_a_weighted_product_is_within_the_bound() -> None:
    """The gradient is one number, a sum of 2,048 terms that add up to 40 times as much."""
    function = jax.jit(
        clipped_grad_sum(
            lambda p, e: jnp.sum((e["a"] @ p["w"]) * e["g"]),
            clip_norm=1e-3,
            method="bookkeeping",
            strategies={"w": "ghost"},
        )
    )
    params = {"w": np.zeros((1, 1), np.float32)}
    found = []
    for seed in range(20):
        a, g = normal(seed, 1024, 1), normal(100 + seed, 1024, 1)
        batch = {"a": np.concatenate([a, a])[None], "g": np.concatenate([g * np.float32(3), -g])[None]}
        found.append(abs(float(function(params, batch, np.ones(1, np.float32))[0]["w"][0, 0])))
    assert max(found) <= 1e-3
    assert np.median(found) > 0.99e-3  # clipped, and not much more than necessary


@pytest.mark.parametrize("strategy", ["ghost", "instantiate"])
def test_bfloat16_products_are_clipped_and_summed_in_float32(strategy: str) -> None:
    """The sum of a thousand examples must not round to bfloat16, whose spacing would exceed C."""
    loss_fn, params, batch = mixed_precision()
    function = jax.jit(clipped_grad_sum(loss_fn, clip_norm=0.3, method="bookkeeping", strategies={"[wkt]*": strategy}))
    rows = np.arange(1000) % EXAMPLES
    many = {name: column[rows] for name, column in batch.items()}
    each = [function(params, batch, np.eye(EXAMPLES, dtype=np.float32)[i])[0] for i in range(EXAMPLES)]
    assert max(np.linalg.norm(flat(sums)) for sums in each) <= 0.3
    total = sum(flat(each[i]) for i in rows)
    found = flat(function(params, many, np.ones(1000, np.float32))[0])
    assert np.linalg.norm(found - total) < 1e-5 * np.linalg.norm(total)
    exact, _ = one_by_one(loss_fn, params, batch, EXAMPLES)
    assert np.linalg.norm(found - clipped(exact, np.bincount(rows), 0.3)) < 2e-2 * np.linalg.norm(found)


@pytest.mark.parametrize("method", ["per_example", "bookkeeping", "ghost"])
def test_frozen_parameters_count_in_no_norm_and_get_no_sum(method: str) -> None:
    (loss_fn, params, batch), _, _, _ = reference("nnx attention")
    frozen = {"attention/query/kernel", "norm/scale", "mlp/kernel"}
    moving = trainable(params, frozen)

    def of_moving(moving: Any, example: Any) -> Any:
        whole = jax.tree.map(lambda m, p: p if m is None else m, moving, params, is_leaf=lambda x: x is None)
        return loss_fn(whole, example)

    gradients, norms = one_by_one(of_moving, moving, batch, EXAMPLES)
    clip_norm = float(np.median(norms))
    function = jax.jit(clipped_grad_sum(loss_fn, clip_norm=clip_norm, method=method, frozen=frozen))
    sums, found = function(params, batch, MASK)
    assert jax.tree.structure(sums) == jax.tree.structure(moving)
    expected = clipped(gradients, MASK, clip_norm)
    assert np.linalg.norm(flat(sums) - expected) <= 2e-5 * np.linalg.norm(expected)
    assert np.abs(np.asarray(found) / norms - 1).max() < 1e-5


def test_frozen_parameters_cost_no_gradient() -> None:
    """If all but the last layer are frozen, no backward pass goes through the others."""
    params = {"w": [normal(i, 64, 64) for i in range(6)]}
    batch = {"x": normal(9, 8, 32, 64)}

    def loss_fn(params: Any, example: Any) -> Any:
        h = example["x"]
        for w in params["w"]:
            h = jnp.tanh(h @ w)
        return jnp.sum(h**2)

    def flops(frozen: set[str]) -> float:
        function = clipped_grad_sum(loss_fn, clip_norm=1.0, method="bookkeeping", frozen=frozen)
        return jax.jit(function).lower(params, batch, np.ones(8, np.float32)).compile().cost_analysis()["flops"]

    assert flops({f"w/{i}" for i in range(5)}) < 0.6 * flops(set())


@pytest.mark.parametrize(
    ("strategies", "message"), [({"v": "ghost"}, "'v' matches no parameter"), ({"w": "gohst"}, "unknown strategy")]
)
def test_an_override_that_means_nothing_is_refused(strategies: dict[str, str], message: str) -> None:
    function = clipped_grad_sum(lambda p, e: jnp.sum(e["x"] * p["w"]), clip_norm=1.0, strategies=strategies)
    with pytest.raises(ValueError, match=message):
        function({"w": normal(1, 4)}, {"x": normal(2, 3, 4)}, np.ones(3, np.float32))


LAYERS = ("dense", "again", "transposed", "bias", "scale", "residual", "convolve", "attend", "cast", "half", "loop")


@st.composite
def networks(draw: st.DrawFn) -> list[tuple[str, int]]:
    return draw(st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, 2)), min_size=1, max_size=6))


def network(layers: list[tuple[str, int]]) -> Case:
    """Draw a random model of [t, 4] whose layers share three square weights and some smaller parameters."""
    params = {
        "w": [normal(i, 4, 4, scale=0.6) for i in range(3)],
        "b": [normal(10 + i, 4) for i in range(3)],
        "k": [normal(20 + i, 3, 4, 4) for i in range(3)],
    }

    def loss_fn(params: Any, example: Any) -> Any:
        h = example["x"]
        for kind, i in layers:
            w, b, k = params["w"][i], params["b"][i], params["k"][i]
            match kind:
                case "dense" | "again":
                    h = jnp.tanh(h @ w)
                case "transposed":
                    h = jnp.sin(h @ w.T)
                case "bias":
                    h = h + b
                case "scale":
                    h = h * b
                case "residual":
                    h = h + jax.nn.gelu(h @ w) @ params["w"][(i + 1) % 3]
                case "convolve":
                    h = jax.lax.conv_general_dilated(h[None], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
                    h = jnp.tanh(h[0])
                case "attend":
                    h = h + jax.nn.softmax((h @ w) @ h.T) @ h
                case "cast":
                    h = h @ jnp.where(w > 0, w, 0.5 * w)
                case "half":
                    h = jnp.concatenate([h[:, :2] @ w[:2], h[:, 2:] @ w[2:]], axis=0)[: h.shape[0]]
                case "loop":
                    h = jax.lax.fori_loop(0, 2, lambda _, h, w=w: jnp.tanh(h @ w), h)
        return jnp.mean(h**2)

    return loss_fn, params, {"x": normal(30, EXAMPLES, 5, 4, scale=1.0)}


@given(networks(), st.sampled_from(["bookkeeping", "all ghost", "all instantiated"]))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_random_networks(layers: list[tuple[str, int]], way: str) -> None:
    loss_fn, params, batch = network(layers)
    reference_sum = clipped_grad_sum(loss_fn, clip_norm=0.05, method="per_example")
    method, strategies, _ = WAYS[way]
    found_sum = clipped_grad_sum(loss_fn, clip_norm=0.05, method=method, strategies=strategies)
    expected, expected_norms = jax.jit(reference_sum)(params, batch, MASK)
    found, norms = jax.jit(found_sum)(params, batch, MASK)
    assert np.linalg.norm(flat(found) - flat(expected)) <= 1e-5 * np.linalg.norm(flat(expected))
    assert np.abs(np.asarray(norms) / np.asarray(expected_norms) - 1).max() < 1e-5
