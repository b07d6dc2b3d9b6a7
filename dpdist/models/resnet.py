"""BiT ResNets (Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", 2020), in Flax NNX.

A ResNet-v2 with group normalisation and weight standardisation, which do not mix examples, instead of batch
normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.families import Family, completed
from dpdist.models.images import check_image, prepare_image
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pooling import max_pool
from dpdist.models.pretrained import CONVOLUTION, POINTWISE, Naming, Tensors, dense, norm, with_weights
from dpdist.models.standardised import StandardisedConv

#: Output channels of the stages at width factor 1.
CHANNELS = (256, 512, 1024, 2048)
#: Blocks in each stage, and the width factor of all stages.
_PUBLISHED = {
    "50x1": ((3, 4, 6, 3), 1),
    "50x3": ((3, 4, 6, 3), 3),
    "101x1": ((3, 4, 23, 3), 1),
    "101x3": ((3, 4, 23, 3), 3),
    "152x4": ((3, 8, 36, 3), 4),
}
VARIANTS = {
    name: {"layers": list(layers), "channels": [factor * width for width in CHANNELS]}
    for name, (layers, factor) in _PUBLISHED.items()
}
GROUPS = 32


class _Norm(nnx.Module):
    """Group normalisation of one image [height, width, channels], then ReLU."""

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.group = nnx.GroupNorm(channels, GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.group(x[None])[0])  # NNX expects a leading batch axis


class _Block(nnx.Module):
    """A pre-activation bottleneck block (He et al. 2016); the first of a stage has a projected shortcut."""

    def __init__(self, channels: int, out: int, stride: int, first: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner = out // 4
        self.norm1 = _Norm(channels, dtype, rngs)
        self.conv1 = StandardisedConv(1, channels, inner, dtype, rngs)
        self.norm2 = _Norm(inner, dtype, rngs)
        self.conv2 = StandardisedConv(3, inner, inner, dtype, rngs, stride=stride)
        self.norm3 = _Norm(inner, dtype, rngs)
        self.conv3 = StandardisedConv(1, inner, out, dtype, rngs)
        self.project = StandardisedConv(1, channels, out, dtype, rngs, stride=stride) if first else None

    def __call__(self, x: Array) -> Array:
        y = self.norm1(x)
        shortcut = x if self.project is None else self.project(y)
        y = self.conv2(self.norm2(self.conv1(y)))
        return shortcut + self.conv3(self.norm3(y))


class _BitResNet(nnx.Module):
    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        colours: int,
        classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width = channels[0] // 4
        self.stem = StandardisedConv(7, colours, width, dtype, rngs, stride=2)
        stages = []
        for stage, (depth, out) in enumerate(zip(layers, channels, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(_Block(width, out, 2 if i == 0 < stage else 1, i == 0, dtype, rngs))
                width = out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        # Always float32, because the loss is computed from these logits.
        self.norm = _Norm(width, jnp.float32, rngs)
        self.head = nnx.Linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        # BiT's pretrained network pads with zeros before max-pooling; the usual padding is minus infinity.
        x = jnp.pad(self.stem(image), ((1, 1), (1, 1), (0, 0)))
        x = max_pool(x, 3, 2)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(self.norm(x).mean((0, 1)))


def bit_resnet(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    classes: int,
    variant: str = "50x1",
    image_size: int = 224,
    pretrained: str | None = None,
    offset: float = 127.5,
    scale: float = 127.5,
    dtype: str = "float32",
    layers: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
) -> Model:
    """Build a BiT ResNet-v2 classifier of `example["image"]`, [height, width, channels].

    The device resizes the image to `image_size` and computes `(image - offset) / scale`, both public constants. With
    the same weights, the logits equal those of `timm`'s `resnetv2_*_bit`.

    Args:
        example: shapes and dtypes of one example.
        classes: number of classes.
        variant: depth and width factor: 50x1, 50x3, 101x1, 101x3 or 152x4.
        image_size: height and width of the network's input; any size works.
        pretrained: path of local weights under `timm`'s names, e.g. of resnetv2_50x1_bit.goog_in21k; None means random
            initial weights.
        offset: subtracted from the image.
        scale: the difference is divided by it.
        dtype: `float32` or `bfloat16`, for convolutions; parameters, weight standardisation and logits are float32.
        layers: number of blocks in each stage; None means the variant's.
        channels: output channels of each stage, multiples of 128; None means the variant's. The stem has a quarter of
            the first stage's.

    Raises:
        ValueError: an option is out of range, or the data has no column `image` of three axes.
    """
    sizes = completed(VARIANTS, variant, layers=layers, channels=channels)
    depths, widths = sizes["layers"], sizes["channels"]
    if len(depths) != len(widths) or min(depths, default=0) < 1:
        raise ValueError(f"layers {list(depths)} and channels {list(widths)} have to name the same stages")
    if any(width < 1 or width % (4 * GROUPS) for width in widths):
        raise ValueError(f"channels {list(widths)} have to be multiples of {4 * GROUPS}")
    colours, products = check_image(example, "bit_resnet"), compute_dtype(dtype)
    model = from_nnx(
        lambda rngs: _BitResNet(depths, widths, colours, classes, products, rngs),
        lambda e: prepare_image(e, offset=offset, scale=scale, size=image_size),
    )
    return with_weights(model, pretrained, naming(depths))


def naming(layers: Sequence[int]) -> Naming:
    """Return the tensor names of `timm`, where the classifier is a 1x1 convolution."""
    tensors: Tensors = {"stem.kernel": ("stem.conv.weight", CONVOLUTION)}
    for stage, depth in enumerate(layers):
        for i in range(depth):
            ours, theirs = f"stages.{stage}.{i}", f"stages.{stage}.blocks.{i}"
            for j in (1, 2, 3):
                tensors |= norm(f"{ours}.norm{j}.group", f"{theirs}.norm{j}")
                tensors[f"{ours}.conv{j}.kernel"] = (f"{theirs}.conv{j}.weight", CONVOLUTION)
            tensors[f"{ours}.project.kernel"] = (f"{theirs}.downsample.conv.weight", CONVOLUTION)
    tensors |= norm("norm.group", "norm") | dense("head", "head.fc", POINTWISE)
    return Naming(tensors=tensors)


def _timm_options(said: dict[str, Any]) -> dict[str, Any] | None:
    """The options that an architecture such as `resnetv2_50x1_bit` stands for; None if it is another."""
    return VARIANTS.get(said["architecture"].removeprefix("resnetv2_").removesuffix("_bit"))


FAMILY = Family(
    model_types=(),
    architecture="",
    keys={},
    variants=VARIANTS,
    timm_options=_timm_options,
    adapted=("stages/*/conv*/kernel",),
)
