"""Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020), in Flax NNX."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.images import check_image, prepare_image
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pretrained import LEADING, POSITIONS, Naming, Tensors, dense, norm, patches, with_weights
from dpdist.models.transformer import Attention, LayerNorm, Mlp

#: Width, depth, heads, the MLP's inner width, and patch side. B, L and H are from the paper, Ti and S from DeiT
#: (Touvron et al. 2020).
VARIANTS = {
    "Ti/16": (192, 12, 3, 768, 16),
    "S/16": (384, 12, 6, 1536, 16),
    "B/16": (768, 12, 12, 3072, 16),
    "L/16": (1024, 24, 16, 4096, 16),
    "H/14": (1280, 32, 16, 5120, 14),
}


class _Layer(nnx.Module):
    def __init__(self, width: int, heads: int, mlp: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = LayerNorm(width, dtype, rngs), LayerNorm(width, dtype, rngs)
        self.attention = Attention(width, heads, dtype, rngs)
        self.mlp = Mlp(width, mlp, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Vit(nnx.Module):
    def __init__(
        self, sizes: Sequence[int], grid: int, channels: int, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        width, depth, heads, mlp, self.patch = sizes
        self.grid = grid
        self.embed = nnx.Linear(self.patch * self.patch * channels, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1 + grid * grid, width)))
        self.layers = nnx.List([_Layer(width, heads, mlp, dtype, rngs) for _ in range(depth)])
        # Always float32, because the loss is computed from these logits.
        self.norm = LayerNorm(width, jnp.float32, rngs)
        self.head = nnx.Linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, image: Array) -> Array:
        # A matrix product instead of a convolution: clipping its gradients is cheaper.
        x = image.reshape(self.grid, self.patch, self.grid, self.patch, -1).swapaxes(1, 2)
        x = self.embed(x.reshape(self.grid * self.grid, -1))
        x = jnp.concatenate([self.class_token[...].astype(x.dtype), x]) + self.positions[...].astype(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[0]))


def vit(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    classes: int,
    variant: str = "B/16",
    image_size: int = 224,
    pretrained: str | None = None,
    offset: float = 127.5,
    scale: float = 127.5,
    dtype: str = "float32",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    patch: int | None = None,
) -> Model:
    """Build a ViT classifier of `example["image"]`, [height, width, channels], with learned position embeddings.

    It classifies by a class token. The device resizes the image to `image_size` and computes `(image - offset) /
    scale`, both public constants. With the same weights, the logits equal those of `ViTForImageClassification` in
    Hugging Face's `transformers`.

    Args:
        example: shapes and dtypes of one example.
        classes: number of classes.
        variant: `Ti/16`, `S/16`, `B/16`, `L/16` or `H/14`.
        image_size: height and width of the network's input, a multiple of the patch side.
        pretrained: path of local weights under `transformers`' names, e.g. of google/vit-base-patch16-224-in21k; None
            means random initial weights. Position embeddings of another image size are interpolated.
        offset: subtracted from the image.
        scale: the difference is divided by it.
        dtype: `float32` or `bfloat16`, for matrix products; parameters, norms and logits are float32.
        width: width of a token; None means the variant's, as for the next four.
        depth: number of layers.
        heads: number of attention heads.
        mlp: inner width of the MLPs.
        patch: side of a patch.

    Raises:
        ValueError: an option is out of range, or the data has no column `image` of three axes.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
    given = (width, depth, heads, mlp, patch)
    sizes = [usual if own is None else own for own, usual in zip(given, VARIANTS[variant], strict=True)]
    if image_size < 1 or image_size % sizes[-1]:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch, {sizes[-1]}")
    channels, grid, products = check_image(example, "vit"), image_size // sizes[-1], compute_dtype(dtype)
    model = from_nnx(
        lambda rngs: _Vit(sizes, grid, channels, classes, products, rngs),
        lambda e: prepare_image(e, offset=offset, scale=scale, size=image_size),
    )
    return with_weights(model, pretrained, _naming(sizes[1], sizes[-1], channels))


def _naming(depth: int, patch: int, channels: int) -> Naming:
    """Return the tensor names of `transformers`, with or without its classifier's prefix."""
    tensors: Tensors = {
        "class_token": ("embeddings.cls_token", LEADING),
        "positions": ("embeddings.position_embeddings", POSITIONS),
    }
    tensors |= dense("embed", "embeddings.patch_embeddings.projection", patches(patch, channels))
    for i in range(depth):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            tensors |= dense(f"{ours}.attention.{name}", f"{theirs}.attention.attention.{name}")
        tensors |= dense(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        tensors |= dense(f"{ours}.mlp.grow", f"{theirs}.intermediate.dense")
        tensors |= dense(f"{ours}.mlp.shrink", f"{theirs}.output.dense")
        tensors |= norm(f"{ours}.norm1", f"{theirs}.layernorm_before")
        tensors |= norm(f"{ours}.norm2", f"{theirs}.layernorm_after")
    tensors |= norm("norm", "layernorm") | dense("head", "classifier")
    return Naming(tensors=tensors, rename=lambda name: name.removeprefix("vit."), ignored=("pooler.",))
