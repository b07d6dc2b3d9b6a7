"""BERT encoders (Devlin et al. 2018) as classifiers of a token sequence, in Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.families import Family, completed
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pretrained import SAME, Naming, Tensors, dense, norm, with_weights
from dpdist.models.transformer import EPSILON, Attention, LayerNorm, Mlp, embed

#: Width, depth, heads and the MLP's inner width; mini and small are from Turc et al. 2019.
VARIANTS = {
    "mini": {"width": 256, "depth": 4, "heads": 4, "mlp": 1024},
    "small": {"width": 512, "depth": 4, "heads": 8, "mlp": 2048},
    "base": {"width": 768, "depth": 12, "heads": 12, "mlp": 3072},
}
#: Number of segments: a token belongs to the first or the second sentence.
SEGMENTS = 2
INIT = nnx.initializers.normal(0.02)


class _Layer(nnx.Module):
    def __init__(self, width: int, heads: int, mlp: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(width, heads, dtype, rngs, init=INIT)
        self.mlp = Mlp(width, mlp, dtype, rngs, init=INIT)
        self.norm1 = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.norm2 = LayerNorm(width, dtype, rngs, epsilon=epsilon)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class _Bert(nnx.Module):
    def __init__(
        self,
        sizes: dict[str, int],
        vocabulary: int,
        positions: int,
        classes: int,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width, heads, mlp = sizes["width"], sizes["heads"], sizes["mlp"]
        self.words = nnx.Param(INIT(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(INIT(rngs.params(), (positions, width)))
        self.segments = nnx.Param(INIT(rngs.params(), (SEGMENTS, width)))
        self.norm = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.layers = nnx.List([_Layer(width, heads, mlp, epsilon, dtype, rngs) for _ in range(sizes["depth"])])
        # Always float32, because the loss is computed from these logits.
        self.pooler = nnx.Linear(width, width, kernel_init=INIT, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(width, classes, kernel_init=INIT, dtype=jnp.float32, rngs=rngs)

    def __call__(self, example: dict[str, Array]) -> Array:
        tokens = example["input_ids"]
        segments = example.get("token_type_ids", jnp.zeros_like(tokens))
        mask = example["attention_mask"] != 0 if "attention_mask" in example else None
        x = embed(self.words[...], tokens) + embed(self.segments[...], segments)
        x = self.norm(x + self.positions[: len(tokens)])
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(jnp.tanh(self.pooler(x[0])))


def bert(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    classes: int,
    variant: str = "base",
    pretrained: str | None = None,
    vocabulary: int = 30522,
    positions: int = 512,
    dtype: str = "float32",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    epsilon: float = EPSILON,
) -> Model:
    """Build a BERT classifier of `example["input_ids"]`, int32[length], that classifies by the first token.

    It uses `example["attention_mask"]` and `example["token_type_ids"]`, both int[length], if the data has them. There
    is no dropout. With the same weights, the logits equal those of `BertForSequenceClassification` in Hugging Face's
    `transformers`.

    Args:
        example: shapes and dtypes of one example.
        classes: number of classes.
        variant: `mini`, `small` or `base`.
        pretrained: path of local weights under `transformers`' names; None means random initial weights. Sizes that
            are not given come from the `config.json` beside them.
        vocabulary: number of token ids, a public constant.
        positions: length of the longest possible sequence.
        dtype: `float32` or `bfloat16`, for matrix products; parameters, norms and logits are float32.
        width: width of a token; None means the variant's, as for the next three.
        depth: number of layers.
        heads: number of attention heads.
        mlp: inner width of the MLPs.
        epsilon: added to the variance in the norms.

    Raises:
        ValueError: an option is out of range, or the data has no column `input_ids` of shape [length].
    """
    sizes = completed(VARIANTS, variant, width=width, depth=depth, heads=heads, mlp=mlp)
    shape = example["input_ids"].shape if "input_ids" in example else None
    if shape is None or len(shape) != 1 or not 1 <= shape[0] <= positions:
        raise ValueError(f"bert needs a column 'input_ids' of shape [length], at most {positions} tokens, not {shape}")
    products = compute_dtype(dtype)
    model = from_nnx(lambda rngs: _Bert(sizes, vocabulary, positions, classes, epsilon, products, rngs), lambda e: e)
    return with_weights(model, pretrained, naming(sizes["depth"]))


def naming(depth: int) -> Naming:
    """Return the tensor names of `transformers`, old and new spellings, with or without its classifier's prefix."""
    tensors: Tensors = {
        "words": ("embeddings.word_embeddings.weight", SAME),
        "positions": ("embeddings.position_embeddings.weight", SAME),
        "segments": ("embeddings.token_type_embeddings.weight", SAME),
    }
    tensors |= norm("norm", "embeddings.LayerNorm")
    for i in range(depth):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            tensors |= dense(f"{ours}.attention.{name}", f"{theirs}.attention.self.{name}")
        tensors |= dense(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        tensors |= norm(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        tensors |= dense(f"{ours}.mlp.grow", f"{theirs}.intermediate.dense")
        tensors |= dense(f"{ours}.mlp.shrink", f"{theirs}.output.dense")
        tensors |= norm(f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    tensors |= dense("pooler", "pooler.dense") | dense("head", "classifier")
    return Naming(
        tensors=tensors,
        prefix="bert.",
        unprefixed=("classifier.",),
        rename=lambda name: name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ),
        ignored=("cls.*", "embeddings.position_ids"),
    )


FAMILY = Family(
    model_types=("bert",),
    architecture="BertForSequenceClassification",
    keys={
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "epsilon": "layer_norm_eps",
    },
    fixed={
        "hidden_act": ("gelu",),
        "type_vocab_size": (SEGMENTS,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    variants=VARIANTS,
)
