"""Losses with operations that JAX cannot differentiate: exact if no gradient goes through them, else named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_clipping import clipped, flat, one_by_one
from zoo import normal

from dpdist.mechanism.clipping import METHODS, UnsupportedLossError, bookkeeping, clipped_grad_sum
from dpdist.program.diagnosis import naming_the_fault
from dpdist.program.plain_gradients import plain_grad_sum

Loss = Callable[[Any, Any], Any]
PARAMS = {"net": {"w": normal(1, 4, 4), "v": normal(2, 4)}, "head": normal(3, 4)}
BATCH = {"x": normal(4, 3, 4, scale=1.0)}
ONES = np.ones(3, np.float32)


def hidden(p: Any, e: Any) -> Any:
    return jnp.tanh(e["x"] @ p["net"]["w"]) * p["net"]["v"]


def score(p: Any, h: Any) -> Any:
    return jnp.sum((h * p["head"]) ** 2)


def shrunk(x: Any, factor: Any = 0.5) -> Any:
    """Multiply until the result falls below a bound."""
    return lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.4, lambda h: h * factor, x)  # LINE: while


def shrinkings(x: Any) -> Any:
    """Count those multiplications: an integer, but the loop also carries values that depend on x."""
    again, body = lambda carry: jnp.max(jnp.abs(carry[1])) > 0.4, lambda carry: (carry[0] + 1, carry[1] * 0.5)
    return lax.while_loop(again, body, (0, x))[0]


def on_host(x: Any) -> Any:
    ends = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.sin, ends, x, vmap_method="sequential")  # LINE: pure_callback


def triangular(x: Any) -> Any:
    return lax.linalg.schur(x[:, None] * x)[0][0]  # LINE: schur


@jax.custom_vjp
def wrong_rule(x: Any) -> Any:
    return x * 2


wrong_rule.defvjp(lambda x: (x * 2, None), lambda _, gradient: (gradient, gradient))


def wrong(x: Any) -> Any:
    return wrong_rule(x)  # LINE: custom_vjp_call


def beside_a_harmless_one(p: Any, e: Any) -> Any:
    loss = score(p, shrunk(hidden(p, e)))
    after = lax.while_loop(lambda h: jnp.sum(h) > 0.4, lambda h: h * p["head"], shrunk(e["x"]))
    return loss + jnp.sum(lax.stop_gradient(after))


HIDDEN, ALL = {"net/v", "net/w"}, {"head", "net/v", "net/w"}
#: The loss, the equation at fault, and the parameters behind it.
UNSUPPORTED: dict[str, tuple[Loss, str, set[str]]] = {
    "after parameters": (lambda p, e: score(p, shrunk(hidden(p, e))), "while", HIDDEN),
    "of the loss": (lambda p, e: shrunk(score(p, hidden(p, e))), "while", ALL),
    "over a parameter": (lambda p, e: score(p, shrunk(e["x"], jnp.sin(p["net"]["v"]))), "while", {"net/v"}),
    "of parameters alone": (lambda p, e: score(p, e["x"] * shrunk(p["net"]["v"])), "while", {"net/v"}),
    "of one that is not stopped": (
        lambda p, e: score(p, shrunk(e["x"] * lax.stop_gradient(p["head"]) * p["net"]["v"])), "while", {"net/v"},
    ),
    "under jit": (jax.jit(lambda p, e: score(p, jax.jit(shrunk)(hidden(p, e)))), "while", HIDDEN),
    "in a branch": (lambda p, e: score(p, lax.cond(e["x"][0] > 0, shrunk, jnp.sin, hidden(p, e))), "while", HIDDEN),
    "in a scan": (lambda p, e: score(p, lax.map(shrunk, hidden(p, e))), "while", HIDDEN),
    "in a rematerialised part": (lambda p, e: score(p, jax.checkpoint(shrunk)(hidden(p, e))), "while", HIDDEN),
    "beside a harmless one": (beside_a_harmless_one, "while", HIDDEN),
    "no rule": (lambda p, e: score(p, triangular(hidden(p, e))), "schur", HIDDEN),
    "wrong rule": (lambda p, e: score(p, wrong(hidden(p, e))), "custom_vjp_call", HIDDEN),
}  # fmt: skip

EXACT: dict[str, Loss] = {
    "stopped after": lambda p, e: score(p, e["x"] * lax.stop_gradient(shrunk(hidden(p, e)))),
    "stopped after, over a parameter": lambda p, e: score(p, lax.stop_gradient(shrunk(e["x"], jnp.sin(p["net"]["v"])))),
    "stopped before": lambda p, e: score(p, shrunk(lax.stop_gradient(hidden(p, e)))),
    "of stopped parameters": lambda p, e: score(p, shrunk(e["x"] * lax.stop_gradient(p["net"]["v"]))),
    "of data alone": lambda p, e: score(p, jnp.tanh(shrunk(e["x"]) @ p["net"]["w"])),
    "integer result": lambda p, e: score(p, hidden(p, e) * shrinkings(hidden(p, e))),
    "boolean result": lambda p, e: score(p, jnp.where(shrunk(hidden(p, e)) > 0.1, hidden(p, e), e["x"])),
    "rounded result": lambda p, e: score(p, hidden(p, e) + lax.floor(9 * shrunk(e["x"], jnp.sin(p["net"]["v"])))),
    "static trip count": lambda p, e: score(p, lax.fori_loop(0, 3, lambda _, h: jnp.sin(h), hidden(p, e))),
}


def summed(loss_fn: Loss, method: str) -> Any:
    """Return the clipped gradient sum; for `plain` the one of plain SGD, which must give the same errors."""
    function = plain_grad_sum(loss_fn) if method == "plain" else clipped_grad_sum(loss_fn, clip_norm=1.0, method=method)

    def named(params: Any, batch: Any, mask: Any) -> Any:
        with naming_the_fault(loss_fn, params, batch, frozenset()):
            return function(params, batch, mask)

    return named


def line_of(primitive: str) -> int:
    """Find the line of this file whose comment names `primitive`."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# LINE: {primitive}"))


@pytest.mark.parametrize("method", [*METHODS, "plain"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_derivative_is_named_with_its_line_and_parameters(name: str, method: str) -> None:
    loss_fn, primitive, behind = UNSUPPORTED[name]
    function = jax.jit(summed(loss_fn, method))
    with pytest.raises(UnsupportedLossError) as caught:
        function(PARAMS, BATCH, ONES)
    message = str(caught.value)
    assert message.startswith(f"{primitive} at {__file__}:{line_of(primitive)}:"), message
    assert {path for path in ALL if path in message} == behind, message
    assert ("lax.scan" if primitive == "while" else "jax.custom_vjp") in message


@pytest.mark.parametrize("method", [*METHODS, "plain"])
def test_a_callback_is_to_be_replaced_not_given_a_derivative(method: str) -> None:
    with pytest.raises(UnsupportedLossError) as caught:
        jax.jit(summed(lambda p, e: score(p, on_host(hidden(p, e))), method))(PARAMS, BATCH, ONES)
    message = str(caught.value)
    assert message.startswith(f"pure_callback at {__file__}:{line_of('pure_callback')}:"), message
    assert "use operations of jax.numpy and jax.lax" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXACT)
def test_what_no_gradient_goes_through_is_exact(name: str, method: str) -> None:
    """dpdist's warnings are errors here, so we know that the requested method did not fall back to another."""
    gradients, norms = one_by_one(EXACT[name], PARAMS, BATCH, 3)
    mask, clip_norm = np.array([1, 0, 1], np.float32), float(np.median(norms))
    sums, found = jax.jit(clipped_grad_sum(EXACT[name], clip_norm=clip_norm, method=method))(PARAMS, BATCH, mask)
    expected = clipped(gradients, mask, clip_norm)
    assert np.linalg.norm(flat(sums) - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.abs(np.asarray(found)[mask > 0] / norms[mask > 0] - 1).max() < 1e-5


def test_per_example_replaces_a_method_that_needs_a_missing_derivative() -> None:
    """`v` goes into a `cond`, which stays one equation in the graph, but no gradient of `v` comes out of it."""

    def loss_fn(p: Any, e: Any) -> Any:
        stopped = [lambda x: lax.stop_gradient(x * p["net"]["v"]), lambda x: lax.stop_gradient(x - p["net"]["v"])]
        return score(p, shrunk(lax.cond(e["x"][0] > 0, *stopped, e["x"])))

    gradients, norms = one_by_one(loss_fn, PARAMS, BATCH, 3)
    clip_norm = float(np.median(norms))
    with pytest.warns(UserWarning, match="falls back to the slower method per_example"):
        sums, _ = clipped_grad_sum(loss_fn, clip_norm=clip_norm, method="ghost")(PARAMS, BATCH, ONES)
    expected = clipped(gradients, ONES, clip_norm)
    assert np.linalg.norm(flat(sums) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_need_no_derivative(method: str) -> None:
    loss_fn, _, _ = UNSUPPORTED["after parameters"]
    function = clipped_grad_sum(loss_fn, clip_norm=1e6, method=method, frozen=frozenset(HIDDEN))
    sums, _ = jax.jit(function)(PARAMS, BATCH, ONES)
    h = jax.vmap(lambda x: shrunk(hidden(PARAMS, {"x": x})))(BATCH["x"])
    assert np.allclose(sums["head"], np.sum(2 * h**2 * PARAMS["head"], axis=0), rtol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "plain"])
def test_an_error_in_the_loss_itself_is_not_replaced(method: str) -> None:
    function = summed(lambda p, e: jnp.sum(e["x"] @ p["head"][:3]), method)
    with pytest.raises(TypeError, match="contracting dimensions"):
        function(PARAMS, BATCH, ONES)


def test_of_many_parameters_the_first_are_named() -> None:
    function = summed(lambda p, e: shrunk(sum(jnp.sum(w * e["x"]) for w in p)), "auto")
    with pytest.raises(UnsupportedLossError, match="gradient of 0, 1, 2, 3, 4, 5, 6, 7 and 3 more goes through"):
        function([normal(i, 4) for i in range(11)], BATCH, ONES)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_scalar_is_refused(method: str) -> None:
    function = summed(lambda p, e: e["x"] * p["w"], method)
    with pytest.raises(UnsupportedLossError, match="floating-point scalar"):
        function({"w": normal(1, 4)}, BATCH, ONES)


@pytest.mark.parametrize("method", [*METHODS, "plain"])
def test_a_complex_parameter_is_refused(method: str) -> None:
    """Its gradient is complex; a cast to float32 would drop the imaginary part."""
    function = summed(lambda p, e: jnp.sum(jnp.abs(e["x"] * p["w"])), method)
    with pytest.raises(UnsupportedLossError, match="w is complex64: give its real and imaginary parts"):
        function({"w": normal(1, 4).astype(np.complex64)}, BATCH, ONES)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_our_own_bug_is_not_reported_as_an_unsupported_loss(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: Any) -> Any:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(bookkeeping._Pass, "norms", mistaken)
    f = summed(lambda p, e: score(p, hidden(p, e)), method)
    with pytest.raises(ValueError, match="shapes do not match"):
        f(PARAMS, BATCH, ONES)
