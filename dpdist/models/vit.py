"""Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020), in Flax NNX."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.errors import InputError
from dpdist.models import Model
from dpdist.models.families import Family, completed
from dpdist.models.images import check_image, prepare_image
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pretrained import LEADING, POSITIONS, Naming, Tensors, dense, norm, patches, with_weights
from dpdist.models.transformer import EPSILON, Attention, LayerNorm, Mlp

#: Width, depth, heads, the MLP's inner width, and patch side. B, L and H are from the paper, Ti and S from DeiT
#: (Touvron et al. 2020).
VARIANTS = {
    "Ti/16": {"width": 192, "depth": 12, "heads": 3, "mlp": 768, "patch": 16},
    "S/16": {"width": 384, "depth": 12, "heads": 6, "mlp": 1536, "patch": 16},
    "B/16": {"width": 768, "depth": 12, "heads": 12, "mlp": 3072, "patch": 16},
    "L/16": {"width": 1024, "depth": 24, "heads": 16, "mlp": 4096, "patch": 16},
    "H/14": {"width": 1280, "depth": 32, "heads": 16, "mlp": 5120, "patch": 14},
}


class _Layer(nnx.Module):
    def __init__(self, width: int, heads: int, mlp: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.norm2 = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.attention = Attention(width, heads, dtype, rngs)
        self.mlp = Mlp(width, mlp, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Vit(nnx.Module):
    def __init__(
        self,
        sizes: dict[str, int],
        grid: int,
        channels: int,
        classes: int,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width, heads, mlp = sizes["width"], sizes["heads"], sizes["mlp"]
        self.grid, self.patch = grid, sizes["patch"]
        self.embed = nnx.Linear(self.patch * self.patch * channels, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1 + grid * grid, width)))
        self.layers = nnx.List([_Layer(width, heads, mlp, epsilon, dtype, rngs) for _ in range(sizes["depth"])])
        # Always float32, because the loss is computed from these logits.
        self.norm = LayerNorm(width, jnp.float32, rngs, epsilon=epsilon)
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
    epsilon: float = EPSILON,
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
        pretrained: path of local weights under `transformers`' or `timm`'s names, e.g. of
            google/vit-base-patch16-224-in21k; None means random initial weights. Sizes that are not given come from
            the `config.json` beside them. Position embeddings of another image size are interpolated.
        offset: subtracted from the image.
        scale: the difference is divided by it.
        dtype: `float32` or `bfloat16`, for matrix products; parameters, norms and logits are float32.
        width: width of a token; None means the variant's, as for the next four.
        depth: number of layers.
        heads: number of attention heads.
        mlp: inner width of the MLPs.
        patch: side of a patch.
        epsilon: added to the variance in the norms; `timm`'s weights come with 1e-6.

    Raises:
        ValueError: an option is out of range, or the data has no column `image` of three axes.
    """
    sizes = completed(VARIANTS, variant, width=width, depth=depth, heads=heads, mlp=mlp, patch=patch)
    side = sizes["patch"]
    if image_size < 1 or image_size % side:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch, {side}")
    channels, grid, products = check_image(example, "vit"), image_size // side, compute_dtype(dtype)
    model = from_nnx(
        lambda rngs: _Vit(sizes, grid, channels, classes, epsilon, products, rngs),
        lambda e: prepare_image(e, offset=offset, scale=scale, size=image_size),
    )
    names = (sizes["depth"], side, channels)
    return with_weights(model, pretrained, naming(*names), timm_naming(*names))


def naming(depth: int, patch: int, channels: int) -> Naming:
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
    return Naming(tensors=tensors, prefix="vit.", unprefixed=("classifier.",), ignored=("pooler.*",))


def timm_naming(depth: int, patch: int, channels: int) -> Naming:
    """Return the tensor names of `timm`, where query, key and value are one matrix."""
    tensors: Tensors = {"class_token": ("cls_token", LEADING), "positions": ("pos_embed", POSITIONS)}
    tensors |= dense("embed", "patch_embed.proj", patches(patch, channels))
    fused = {}
    for i in range(depth):
        ours, theirs = f"layers.{i}", f"blocks.{i}"
        for name in ("query", "key", "value"):
            tensors |= dense(f"{ours}.attention.{name}", f"{theirs}.attn.{name}")
        for part in ("weight", "bias"):
            fused[f"{theirs}.attn.qkv.{part}"] = tuple(f"{theirs}.attn.{n}.{part}" for n in ("query", "key", "value"))
        tensors |= dense(f"{ours}.attention.out", f"{theirs}.attn.proj")
        tensors |= dense(f"{ours}.mlp.grow", f"{theirs}.mlp.fc1") | dense(f"{ours}.mlp.shrink", f"{theirs}.mlp.fc2")
        tensors |= norm(f"{ours}.norm1", f"{theirs}.norm1") | norm(f"{ours}.norm2", f"{theirs}.norm2")
    return Naming(tensors=tensors | norm("norm", "norm") | dense("head", "head"), fused=fused)


#: `timm`'s words for the variants.
TIMM_WORDS = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
TIMM_EPSILON = 1e-6


#: `timm`'s arguments of a model, by our option; the MLP's width is `mlp_ratio` times a token's, rounded down.
TIMM_ARGUMENTS = {"width": "embed_dim", "depth": "depth", "heads": "num_heads", "patch": "patch_size"}
TIMM_ARGUMENTS |= {"image_size": "img_size"}


def _timm_options(said: dict[str, Any]) -> dict[str, Any] | None:
    """The options that `vit_base_patch16_224` and `model_args` stand for; None if the architecture is another."""
    for variant, sizes in VARIANTS.items():
        word = TIMM_WORDS[variant.split("/")[0]]
        found = re.fullmatch(rf"vit_{word}_patch(\d+)_(\d+)", said["architecture"])
        if found:
            patch, image_size = map(int, found.groups())
            arguments = said.get("model_args", {})
            unknown = arguments.keys() - {
                *TIMM_ARGUMENTS.values(),
                "mlp_ratio",
                "num_classes",
                "in_chans",
                "global_pool",
            }
            pool = arguments.get("global_pool", said.get("global_pool", "token"))
            if unknown or pool != "token":
                what = f"model_args.{min(unknown)}" if unknown else f"global_pool {pool}"
                raise InputError(
                    "model.options.pretrained", what, "in config.json is not computed here; give a plain ViT's weights."
                )
            changed = {ours: arguments[theirs] for ours, theirs in TIMM_ARGUMENTS.items() if theirs in arguments}
            options = sizes | {"patch": patch, "image_size": image_size, "epsilon": TIMM_EPSILON} | changed
            ratio = arguments.get("mlp_ratio", sizes["mlp"] / sizes["width"])
            return options | {"mlp": int(options["width"] * ratio)}
    return None


FAMILY = Family(
    model_types=("vit",),
    architecture="ViTForImageClassification",
    keys={
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "patch": "patch_size",
        "epsilon": "layer_norm_eps",
    },
    suggested={"image_size": "image_size"},
    fixed={"hidden_act": ("gelu",), "qkv_bias": (True,)},
    variants=VARIANTS,
    timm_options=_timm_options,
)
