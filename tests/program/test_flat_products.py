"""Products over examples and tokens become ordinary ones, and plain SGD is the gradient of the summed losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr
from jax.flatten_util import ravel_pytree

from dpdist import models
from dpdist.config import Model
from dpdist.program.flat_products import with_flat_products
from dpdist.program.plain_gradients import plain_grad_sum

SIZE = 5
IMAGE = {"image": jax.ShapeDtypeStruct((16, 16, 3), np.uint8), "label": jax.ShapeDtypeStruct((), np.int32)}
TEXT = {"input_ids": jax.ShapeDtypeStruct((7,), np.int32), "label": jax.ShapeDtypeStruct((), np.int32)}
TINY = {"width": 12, "depth": 2, "heads": 3, "mlp": 24}
MODELS = {
    "vit": (Model(name="vit", options={"image_size": 16, "patch": 8, **TINY}), IMAGE),
    "bert": (Model(name="bert", options={"variant": "mini", "vocabulary": 9, "positions": 7, **TINY}), TEXT),
    "cnn": (Model(name="cnn"), IMAGE),
}


def products(jaxpr: Jaxpr) -> Iterator[Any]:
    """The dimension numbers of every product, in calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["dimension_numbers"]
        elif equation.primitive.name == "jit":
            yield from products(equation.params["jaxpr"].jaxpr)


@pytest.mark.parametrize("name", MODELS)
def test_plain_sgd_is_the_gradient_of_the_summed_losses_by_products_that_contract_one_axis(name: str) -> None:
    chosen, example = MODELS[name]
    model = models.build(chosen, example=example, classes=3)
    loss_fn, params = models.example_loss(model), model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {key: rng.integers(0, 3, (SIZE, *column.shape)).astype(column.dtype) for key, column in example.items()}
    mask = np.array([1, 1, 0, 1, 1], np.float32)

    def total(params: Any) -> jax.Array:
        return jnp.sum(jax.vmap(loss_fn, (None, 0))(params, batch) * mask)

    expected, _ = ravel_pytree(jax.jit(jax.grad(total))(params))
    sums, _ = ravel_pytree(jax.jit(plain_grad_sum(loss_fn))(params, batch, mask)[0])
    assert np.linalg.norm(sums - expected) <= 1e-5 * np.linalg.norm(expected)
    found = list(products(jax.make_jaxpr(plain_grad_sum(loss_fn))(params, batch, mask).jaxpr))
    assert found
    assert all(len(contracted[0]) == 1 for contracted, _ in found)


@pytest.mark.parametrize(
    "numbers",
    [
        (((0, 1), (0, 1)), ((), ())),
        (((1, 0), (1, 0)), ((), ())),
        (((1, 2), (1, 2)), ((0,), (0,))),
        (((0, 1), (0, 1)), ((2,), (2,))),
        (((0, 1, 2), (0, 1, 2)), ((), ())),
    ],
)
def test_neighbouring_axes_are_contracted_as_one(numbers: Any) -> None:
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (2, 3, 4, 6))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tanh(jax.lax.dot_general(x, y, numbers, precision=jax.lax.Precision.HIGHEST))

    flat = with_flat_products(product)
    assert np.allclose(flat(x, y), product(x, y), atol=1e-6)
    ((contracted, _),) = products(jax.make_jaxpr(flat)(x, y).jaxpr)
    assert len(contracted[0]) == 1


@pytest.mark.parametrize("numbers", [(((0, 2), (0, 2)), ((), ())), (((0, 1), (1, 0)), ((), ()))])
def test_axes_that_are_no_neighbours_in_both_stay_as_they_are(numbers: Any) -> None:
    x, y = jax.random.normal(jax.random.key(0), (3, 3, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, y, numbers)

    flat = with_flat_products(product)
    assert np.allclose(flat(x, y), product(x, y), atol=1e-6)
    assert list(products(jax.make_jaxpr(flat)(x, y).jaxpr)) == [numbers]


def test_what_is_not_a_product_is_the_same() -> None:
    def function(x: jax.Array, key: jax.Array) -> dict[str, Any]:
        noise = jax.random.normal(key, x.shape)
        total, _ = jax.lax.scan(lambda a, b: (a @ b, None), x, jnp.stack([x, noise]))
        return {"x": jax.nn.softmax(total), "where": jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), "one": 1.0}

    x, key = jnp.ones((3, 3)), jax.random.key(2)
    expected, found = jax.jit(function)(x, key), jax.jit(with_flat_products(function))(x, key)
    assert jax.tree.all(jax.tree.map(np.array_equal, expected, found))
