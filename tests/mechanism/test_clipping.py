"""Clipped gradient sums equal a float64 reference, and no example contributes more than C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdist import config, models
from dpdist.mechanism import clipping
from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.program.plain_gradients import plain_grad_sum

Loss = Callable[[Any, Any], Any]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def one_by_one(loss_fn: Loss, params: Any, batch: Any, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute gradients [p, d] and norms [p], one example after the other, in float64."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda x: np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), (params, batch)
        )
        gradient = jax.jit(jax.grad(loss_fn))
        gradients = np.stack(
            [flat(gradient(params, jax.tree.map(lambda x, i=i: x[i], batch))) for i in range(examples)]
        )
    return gradients, np.linalg.norm(gradients, axis=1)


def clipped(gradients: np.ndarray, weights: np.ndarray, clip_norm: float) -> np.ndarray:
    """Sum the rows, each clipped to C (Abadi et al. 2016, Algorithm 1)."""
    return np.tensordot(weights * np.minimum(1.0, clip_norm / np.linalg.norm(gradients, axis=1)), gradients, axes=1)


def plain_jax_model() -> tuple[Loss, Any]:
    """Tied weights, an embedding, a scan and a scalar parameter, in plain JAX."""
    random = np.random.default_rng(5)
    params = {"embed": random.normal(size=(7, 6)), "w": random.normal(size=(6, 6)) * 0.4, "scale": np.array(0.7)}

    def loss_fn(params: Any, example: Any) -> Any:
        def body(h: Any, token: Any) -> Any:
            return jnp.tanh(h @ params["w"] + params["embed"][token]), None

        h, _ = jax.lax.scan(body, params["embed"][0] * example["x"], example["tokens"])
        return params["scale"] * jnp.sum((params["embed"] @ h) ** 2)

    return loss_fn, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def case(name: str) -> tuple[Loss, Any, Any]:
    """Return (loss, params, a batch of 6) of a model with gradient norms both above and below C = 1."""
    random = np.random.default_rng(2)
    if name == "plain":
        loss_fn, params = plain_jax_model()
        batch = {
            "x": random.normal(size=(6, 6)).astype(np.float32),
            "tokens": random.integers(0, 7, (6, 4)).astype(np.int32),
        }
        return loss_fn, params, batch
    shape = {"mlp": (9, 8), "cnn": (14, 14, 1)}[name]
    batch = {
        "image": random.normal(size=(6, *shape)).astype(np.float32),
        "label": random.integers(0, 5, 6).astype(np.int32),
    }
    example = {column: jax.ShapeDtypeStruct(values.shape[1:], values.dtype) for column, values in batch.items()}
    model = models.build(config.Model(name=name, options={"scale": 1.0}), example=example, classes=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: (random.normal(size=x.shape) / np.sqrt(x.shape[0])).astype(np.float32), shapes)
    return models.example_loss(model), params, batch


@pytest.mark.parametrize(("name", "method"), [("mlp", "per_example"), ("cnn", "auto"), ("plain", "per_example")])
def test_sums_and_norms_are_those_of_one_example_after_the_other(name: str, method: str) -> None:
    loss_fn, params, batch = case(name)
    mask = np.array([1, 1, 0, 1, 1, 1], np.float32)
    gradients, expected_norms = one_by_one(loss_fn, params, batch, 6)
    clip_norm = float(np.median(expected_norms))  # clips half of the examples
    expected = clipped(gradients, mask, clip_norm)
    sums, norms = jax.jit(clipped_grad_sum(loss_fn, clip_norm=clip_norm, method=method))(params, batch, mask)
    assert jax.tree.structure(sums) == jax.tree.structure(params)
    assert [s.shape for s in jax.tree.leaves(sums)] == [p.shape for p in jax.tree.leaves(params)]
    assert {s.dtype for s in jax.tree.leaves(sums)} == {np.dtype(np.float32)}
    assert norms.dtype == np.float32
    assert np.abs(np.asarray(norms)[mask > 0] / expected_norms[mask > 0] - 1).max() < 1e-5
    # Norms are increased by a margin of 2e-6 before clipping; the rest is rounding.
    assert np.linalg.norm(flat(sums) - expected) < 1e-5 * np.linalg.norm(expected)


def linear(params: Any, example: Any) -> Any:
    """A loss whose gradient is the example itself, to test any gradient we like."""
    return sum(jnp.sum(p * example[name]) for name, p in params.items())


ZEROS = {"w": np.zeros((3, 50), np.float32), "b": np.zeros(11, np.float32)}
DIMENSION = 161
CLIP_NORMS = (1e-6, 0.5, 1.0, 1e6)
linear_sums = {c: jax.jit(clipped_grad_sum(linear, clip_norm=c)) for c in CLIP_NORMS}


def rows(gradients: np.ndarray) -> dict[str, np.ndarray]:
    """Turn gradients [p, 161] into a batch for `linear`."""
    gradients = np.asarray(gradients, np.float32)
    return {"w": gradients[:, :150].reshape(-1, 3, 50), "b": gradients[:, 150:]}


def total(clip_norm: float, gradients: np.ndarray, mask: Any = None) -> np.ndarray:
    """Return the clipped sum in the layout of `gradients`, in float64."""
    sums, _ = linear_sums[clip_norm](
        ZEROS, rows(gradients), np.ones(len(gradients), np.float32) if mask is None else np.asarray(mask, np.float32)
    )
    return np.concatenate([np.asarray(sums["w"], np.float64).ravel(), np.asarray(sums["b"], np.float64)])


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(CLIP_NORMS), st.lists(st.floats(-6, 6), min_size=1, max_size=DIMENSION)
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_no_example_adds_more_than_the_clipping_norm(seed: int, clip_norm: float, exponents: list[float]) -> None:
    """Draw gradients whose coordinates mix scales from 1e-6 to 1e6."""
    random = np.random.default_rng(seed)
    gradient = random.normal(size=DIMENSION) * 10.0 ** random.choice(exponents, DIMENSION)
    gradient = gradient.astype(np.float32).astype(np.float64)
    contribution, norm = total(clip_norm, gradient[None]), np.linalg.norm(gradient)
    assert np.linalg.norm(contribution) <= clip_norm
    expected = gradient * min(1.0, clip_norm / norm)
    assert np.linalg.norm(contribution - expected) <= 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("factor", [1 - 1e-5, 1 - 1e-7, 1.0, 1 + 1e-7, 1 + 1e-6, 1 + 1e-5, 1e3])
@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
def test_rounding_near_the_clipping_norm_never_exceeds_it(factor: float, clip_norm: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        gradient = random.normal(size=DIMENSION)
        gradient *= factor * clip_norm / np.linalg.norm(gradient)
        assert np.linalg.norm(total(clip_norm, gradient[None])) <= clip_norm


def test_a_trained_models_contributions_are_bounded_one_by_one() -> None:
    loss_fn, params, batch = case("mlp")
    params = jax.tree.map(lambda x: x * 5, params)
    sums = jax.jit(clipped_grad_sum(loss_fn, clip_norm=0.1))
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        scaled = batch | {"image": batch["image"] * np.float32(scale)}
        for i in range(6):
            contribution, norms = sums(params, scaled, np.eye(6, dtype=np.float32)[i])
            assert np.linalg.norm(flat(contribution)) <= 0.1
            assert np.isfinite(norms[i])


def test_a_gradient_that_is_not_finite_adds_exactly_nothing() -> None:
    random = np.random.default_rng(1)
    good = random.normal(size=(9, DIMENSION))
    bad = good.copy()
    bad[1, 5] = np.nan
    bad[2, 160] = np.inf
    bad[3, 0] = -np.inf
    bad[4] = np.nan
    bad[5, 7] = 1e25  # its square overflows in float32
    bad[6] = 3e18  # each square is finite, their sum is not
    mask = np.array([1, 0, 0, 0, 0, 0, 0, 1, 1])
    assert np.array_equal(total(1.0, bad), total(1.0, good, mask))
    for i in range(1, 7):
        assert not total(1.0, bad[i : i + 1]).any()
        norm = linear_sums[1.0](ZEROS, rows(bad[i : i + 1]), np.ones(1, np.float32))[1]
        assert not np.isfinite(norm[0])  # and the norm says so


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30, 7.0])
def test_masked_rows_add_exactly_nothing_whatever_they_hold(garbage: float) -> None:
    gradients = np.random.default_rng(3).normal(size=(6, DIMENSION))
    mask = np.array([1, 0, 1, 1, 0, 0])
    filled = np.where(mask[:, None] > 0, gradients, garbage)
    zeroed = np.where(mask[:, None] > 0, gradients, 0.0)
    assert np.array_equal(total(1.0, filled, mask), total(1.0, zeroed, mask))
    assert np.array_equal(total(1.0, filled, np.zeros(6)), np.zeros(DIMENSION))


def test_masked_rows_of_nan_data_leave_a_network_undisturbed() -> None:
    loss_fn, params, batch = case("mlp")
    mask = np.array([1, 0, 1, 1, 0, 0], np.float32)
    dirty = batch | {"image": np.where(mask[:, None, None] > 0, batch["image"], np.nan)}
    sums = jax.jit(clipped_grad_sum(loss_fn, clip_norm=0.5))
    assert np.array_equal(flat(sums(params, batch, mask)[0]), flat(sums(params, dirty, mask)[0]))
    nothing, _ = sums(params, dirty, np.zeros(6, np.float32))
    assert np.array_equal(flat(nothing), np.zeros_like(flat(params)))


def test_a_gradient_of_zeros_adds_zeros() -> None:
    gradients = np.random.default_rng(4).normal(size=(3, DIMENSION))
    gradients[1] = 0
    assert np.array_equal(total(1.0, gradients), total(1.0, gradients, [1, 0, 1]))
    assert np.array_equal(total(1.0, gradients[1:2]), np.zeros(DIMENSION))
    assert linear_sums[1.0](ZEROS, rows(gradients), np.ones(3, np.float32))[1][1] == 0


def test_a_small_gradient_is_not_scaled() -> None:
    gradient = np.random.default_rng(4).normal(size=(1, DIMENSION)).astype(np.float32) * np.float32(1e-3)
    assert np.array_equal(total(1.0, gradient), gradient[0].astype(np.float64))


def test_bfloat16_gradients_are_clipped_and_summed_in_float32() -> None:
    loss_fn, params, batch = case("mlp")
    params = jax.tree.map(lambda x: (x * 3).astype(jnp.bfloat16), params)
    batch = batch | {"image": jnp.asarray(batch["image"], jnp.bfloat16)}
    clip_norm, ones = 0.3, np.ones(6, np.float32)
    gradients = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {np.dtype(jnp.bfloat16)}
    separate = np.stack([flat(jax.tree.map(lambda g, i=i: g[i], gradients)) for i in range(6)])
    norms, expected = np.linalg.norm(separate, axis=1), clipped(separate, ones, clip_norm)
    function = jax.jit(clipped_grad_sum(loss_fn, clip_norm=clip_norm))
    sums, found = function(params, batch, ones)
    assert {s.dtype for s in jax.tree.leaves(sums)} == {np.dtype(np.float32)}
    # Fusion may keep more digits of an intermediate value than the gradient stored here has.
    assert np.abs(np.asarray(found) / norms - 1).max() < 2e-2
    assert np.linalg.norm(flat(sums) - expected) < 2e-2 * np.linalg.norm(expected)
    for i in range(6):
        assert np.linalg.norm(flat(function(params, batch, np.eye(6, dtype=np.float32)[i])[0])) <= clip_norm


def whole_norm(gradient: np.ndarray) -> tuple[float, float]:
    """Return (computed norm / true norm, norm of the contribution) of one huge gradient at C = 1."""
    function = jax.jit(clipped_grad_sum(lambda params, example: jnp.sum(params * example), clip_norm=1.0))
    sums, norms = function(jnp.zeros(gradient.shape), gradient[None], np.ones(1, np.float32))
    true = np.sqrt(np.sum(np.square(gradient, dtype=np.float64)))
    return float(norms[0]) / true, float(np.sqrt(np.sum(np.square(np.asarray(sums), dtype=np.float64))))


def test_the_norm_of_a_huge_model_is_accurate() -> None:
    """A sequential float32 sum of 2^25 equal squares stops at 2^24: the norm would be 30% too small, and the
    contribution 1.4 C.
    """
    ratio, contribution = whole_norm(np.full(2**25, 0.1, np.float32))
    assert abs(ratio - 1) < 1e-6
    assert 1 - 2e-5 < contribution <= 1


def test_small_coordinates_beside_a_large_one_are_counted() -> None:
    """Next to 1, each square of 4e-8 is lost in a sequential float32 sum; together they are 0.17."""
    gradient = np.full(2**22, 2e-4, np.float32)
    gradient[0] = 1
    ratio, contribution = whole_norm(gradient)
    assert abs(ratio - 1) < 1e-6
    assert 1 - 2e-5 < contribution <= 1


def test_padding_without_a_gradient_leaves_the_plain_sum_finite() -> None:
    def loss_fn(w: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
        return jnp.sqrt(w * jnp.abs(example["x"]))  # at x = 0 its gradient is 0 * inf

    batch = {"x": jnp.array([4.0, 0.0, 1.0])}
    sums, _ = plain_grad_sum(loss_fn)(jnp.float32(1.0), batch, jnp.array([1.0, 0.0, 1.0]))
    assert np.allclose(sums, 0.5 * (2.0 + 1.0))
    nothing, _ = plain_grad_sum(loss_fn)(jnp.float32(1.0), {"x": jnp.zeros(3)}, jnp.zeros(3))
    assert nothing == 0


def test_the_plain_sum_is_an_ordinary_gradient() -> None:
    loss_fn, params, batch = case("mlp")
    mask = np.array([1, 1, 0, 1, 1, 1], np.float32)
    sums, norms = jax.jit(plain_grad_sum(loss_fn))(params, batch, mask)
    expected = np.tensordot(mask, one_by_one(loss_fn, params, batch, 6)[0], axes=1)
    assert np.abs(flat(sums) - expected).max() < 1e-5 * np.abs(expected).max()
    assert not norms.any()


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, 1e-25, 1e30, float("nan")])
def test_a_clipping_norm_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clipped_grad_sum(linear, clip_norm=clip_norm)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="gohst"):
        clipped_grad_sum(linear, clip_norm=1.0, method="gohst")


def test_every_name_in_all_exists() -> None:
    assert [name for name in clipping.__all__ if not hasattr(clipping, name)] == []
