"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), in Flax NNX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.decoder import causal_attention, check_tokens, mask_of
from dpdist.models.families import Family, completed
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pretrained import SAME, Naming, Tensors, dense, norm, with_weights
from dpdist.models.transformer import LayerNorm, embed

#: The published sizes. The MLP is four times as wide as a token.
VARIANTS = {
    "small": {"width": 768, "depth": 12, "heads": 12},
    "medium": {"width": 1024, "depth": 24, "heads": 16},
    "large": {"width": 1280, "depth": 36, "heads": 20},
    "xl": {"width": 1600, "depth": 48, "heads": 25},
}
INIT = nnx.initializers.normal(0.02)


class _Attention(nnx.Module):
    """Causal attention; query, key and value are one matrix, as in the published weights."""

    def __init__(self, width: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=INIT, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=INIT, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        q, k, v = (part.reshape(len(x), self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.out(causal_attention(q, k, v, mask))


class _Mlp(nnx.Module):
    """Two dense layers with the GELU by tanh in between."""

    def __init__(self, width: int, inner: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.grow = nnx.Linear(width, inner, kernel_init=INIT, dtype=dtype, rngs=rngs)
        self.shrink = nnx.Linear(inner, width, kernel_init=INIT, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.shrink(jax.nn.gelu(self.grow(x), approximate=True))


class _Layer(nnx.Module):
    def __init__(self, width: int, heads: int, mlp: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.attention = _Attention(width, heads, dtype, rngs)
        self.norm2 = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.mlp = _Mlp(width, mlp, dtype, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class _Gpt2(nnx.Module):
    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.words = nnx.Param(INIT(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(INIT(rngs.params(), (positions, width)))
        self.layers = nnx.List([_Layer(width, heads, mlp, epsilon, dtype, rngs) for _ in range(depth)])
        self.norm = LayerNorm(width, dtype, rngs, epsilon=epsilon)
        self.dtype = dtype

    def __call__(self, example: dict[str, Array]) -> Array:
        tokens, mask = example["input_ids"], mask_of(example)
        x = (embed(self.words[...], tokens) + self.positions[: len(tokens)]).astype(self.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        # The output layer is the table of words again.
        return jnp.dot(self.norm(x), self.words[...].astype(self.dtype).T, preferred_element_type=jnp.float32)


def gpt2(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    variant: str = "small",
    pretrained: str | None = None,
    dtype: str = "float32",
    vocabulary: int = 50257,
    positions: int = 1024,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    epsilon: float = 1e-5,
) -> Model:
    """Build GPT-2, a language model of `example["input_ids"]`, int[length], with logits float32[length, vocabulary].

    It uses `example["attention_mask"]`, int[length], if the data has it. There is no dropout. With the same weights,
    the logits equal those of `GPT2LMHeadModel` in Hugging Face's `transformers`.

    Args:
        example: shapes and dtypes of one example.
        variant: `small`, `medium`, `large` or `xl`.
        pretrained: path of local weights under `transformers`' names; None means random initial weights. Sizes that
            are not given come from the `config.json` beside them.
        dtype: `float32` or `bfloat16`, for matrix products; parameters, norms and logits are float32.
        vocabulary: number of token ids, a public constant.
        positions: length of the longest possible sequence.
        width: width of a token; None means the variant's, as for the next two.
        depth: number of layers.
        heads: number of attention heads.
        mlp: inner width of the MLPs; None means four times the width of a token.
        epsilon: added to the variance in the norms.

    Raises:
        ValueError: an option is out of range, or the data has no column `input_ids` of shape [length].
    """
    sizes = _complete(completed(VARIANTS, variant, width=width, depth=depth, heads=heads, mlp=mlp))
    sizes |= {"vocabulary": vocabulary, "positions": positions}
    check_tokens(example, "gpt2", positions)
    products = compute_dtype(dtype)
    model = from_nnx(lambda rngs: _Gpt2(**sizes, epsilon=epsilon, dtype=products, rngs=rngs), lambda e: e)
    return with_weights(model, pretrained, naming(sizes["depth"]))


def naming(depth: int) -> Naming:
    """Return the tensor names of `transformers`, whose matrices are [in, out] here alone."""
    tensors: Tensors = {"words": ("wte.weight", SAME), "positions": ("wpe.weight", SAME)}
    for i in range(depth):
        ours, theirs = f"layers.{i}", f"h.{i}"
        tensors |= norm(f"{ours}.norm1", f"{theirs}.ln_1") | norm(f"{ours}.norm2", f"{theirs}.ln_2")
        tensors |= dense(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", SAME)
        tensors |= dense(f"{ours}.attention.out", f"{theirs}.attn.c_proj", SAME)
        tensors |= dense(f"{ours}.mlp.grow", f"{theirs}.mlp.c_fc", SAME)
        tensors |= dense(f"{ours}.mlp.shrink", f"{theirs}.mlp.c_proj", SAME)
    tensors |= norm("norm", "ln_f")
    # Older files hold the causal mask too.
    masks = ("h.*.attn.bias", "h.*.attn.masked_bias")
    return Naming(tensors=tensors, prefix="transformer.", ignored=masks, copies={"lm_head.weight": "wte.weight"})


def _complete(sizes: dict[str, Any]) -> dict[str, Any]:
    return sizes if sizes.get("mlp") else sizes | {"mlp": 4 * sizes["width"]}


def _finish(said: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Without its own special token, whose number a smaller vocabulary may not have."""
    return said if options["vocabulary"] > 50256 else said | {"bos_token_id": None, "eos_token_id": None}


FAMILY = Family(
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    keys={
        "vocabulary": "vocab_size",
        "positions": "n_positions",
        "width": "n_embd",
        "depth": "n_layer",
        "heads": "n_head",
        "mlp": "n_inner",
        "epsilon": "layer_norm_epsilon",
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    variants=VARIANTS,
    complete=_complete,
    finish=_finish,
)
