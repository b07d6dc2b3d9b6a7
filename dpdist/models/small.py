"""Small models from the DP literature, in Flax NNX: an MLP and a CNN for 28x28 images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.images import prepare_image
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
    """Build fully connected layers of the widths `hidden` on `example["image"]`, or else `example["features"]`.

    It may have any shape. The device computes `(image - offset) / scale`, both public constants; a scale of None is 255
    for uint8 and 1 for anything else.

    Raises:
        ValueError: `activation` is not one of ACTIVATIONS, or the data has neither column.
    """
    column = next((name for name in ("image", "features") if name in example), None)
    if column is None:
        raise ValueError(f"the MLP needs a column 'image' or 'features'; there are {', '.join(sorted(example))}")
    widths = [math.prod(example[column].shape), *hidden, classes]
    act, divisor = _activation(activation), _scale(scale, example[column].dtype)

    def prepare(example: dict[str, Array]) -> Array:
        return prepare_image({"image": example[column]}, offset=offset, scale=divisor)

    return from_nnx(lambda rngs: _Mlp(widths, act, rngs), prepare)


def _scale(scale: float | None, dtype: DTypeLike) -> float:
    """What inputs are divided by: the public constant given, or what brings uint8 into [0, 1]."""
    return scale if scale is not None else 255.0 if dtype == jnp.uint8 else 1.0


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
    Differential Privacy", AAAI 2021). The device computes `(image - offset) / scale`, both public constants; a
    scale of None is 255 for uint8 and 1 for anything else.

    Raises:
        ValueError: `activation` is not one of ACTIVATIONS, or the images are smaller than 14x14 or have no channel
            axis.
    """
    if "image" not in example:
        raise ValueError(f"the CNN needs a column 'image'; there are {', '.join(sorted(example))}")
    shape = example["image"].shape
    if len(shape) != 3 or min(shape[:2]) < 14:
        raise ValueError(f"the CNN needs images of at least 14x14 with a channel axis, not shape {shape}")
    act = _activation(activation)
    divisor = _scale(scale, example["image"].dtype)
    return from_nnx(
        lambda rngs: _Cnn(shape, classes, act, rngs), lambda e: prepare_image(e, offset=offset, scale=divisor)
    )
