"""Small models from the DP literature, in Flax NNX: an MLP and a CNN for 28x28 images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.images import prepare_image, usual_scale
from dpdist.models.nnx_model import from_nnx
from dpdist.models.pooling import max_pool

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
}


def _activation(name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class _Mlp(nnx.Module):
    def __init__(self, widths: Sequence[int], activation: Callable[[Array], Array], rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(widths)])
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        x = x.reshape(-1)
        for layer in list(self.layers)[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def mlp(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    classes: int,
    hidden: Sequence[int] = (64,),
    activation: str = "tanh",
    offset: float = 0.0,
    scale: float | None = None,
) -> Model:
    """Build fully connected layers of the widths `hidden` on `example["image"]`, which may have any shape.

    The device computes `(image - offset) / scale`, both public constants; the scale is 255 for images of uint8, and 1
    for others, unless it is given.

    Raises:
        ValueError: `activation` is not one of ACTIVATIONS, or there is no column `image`.
    """
    usual = usual_scale(example, "mlp")
    scale = usual if scale is None else scale
    widths = [math.prod(example["image"].shape), *hidden, classes]
    act = _activation(activation)
    return from_nnx(lambda rngs: _Mlp(widths, act, rngs), lambda e: prepare_image(e, offset=offset, scale=scale))


class _Cnn(nnx.Module):
    def __init__(
        self, shape: Sequence[int], classes: int, activation: Callable[[Array], Array], rngs: nnx.Rngs
    ) -> None:
        self.conv1 = nnx.Conv(shape[-1], 16, (8, 8), strides=2, padding="SAME", rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (4, 4), strides=2, padding="VALID", rngs=rngs)
        self.activation = activation
        features = nnx.eval_shape(lambda: self.features(jnp.zeros(tuple(shape)))).size
        self.dense = nnx.Linear(features, 32, rngs=rngs)
        self.head = nnx.Linear(32, classes, rngs=rngs)

    def features(self, x: Array) -> Array:
        x = max_pool(self.activation(self.conv1(x)), 2, 1)
        x = max_pool(self.activation(self.conv2(x)), 2, 1)
        return x.reshape(-1)

    def __call__(self, x: Array) -> Array:
        return self.head(self.activation(self.dense(self.features(x))))


def cnn(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    classes: int,
    activation: str = "tanh",
    offset: float = 0.0,
    scale: float | None = None,
) -> Model:
    """Build the DP literature's CNN for 28x28 images; it has 26,010 parameters for one channel and 10 classes.

    It has two strided convolutions and two dense layers. The default activation is tanh, because gradients of bounded
    activations lose less by clipping (Papernot et al., "Tempered Sigmoid Activations for Deep Learning with
    Differential Privacy", AAAI 2021). The device computes `(image - offset) / scale`, both public constants; the scale
    is 255 for images of uint8, and 1 for others, unless it is given.

    Raises:
        ValueError: `activation` is not one of ACTIVATIONS, or the images are smaller than 14x14 or have no channel
            axis.
    """
    usual = usual_scale(example, "cnn")
    scale = usual if scale is None else scale
    shape = example["image"].shape
    if len(shape) != 3 or min(shape[:2]) < 14:
        raise ValueError(f"the CNN needs images of at least 14x14 with a channel axis, not shape {shape}")
    act = _activation(activation)
    return from_nnx(
        lambda rngs: _Cnn(shape, classes, act, rngs), lambda e: prepare_image(e, offset=offset, scale=scale)
    )
