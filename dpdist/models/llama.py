"""Decoders in the shape of Llama (Touvron et al. 2023) and Gemma (Mesnard et al. 2024), in Flax NNX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dpdist.models import Model
from dpdist.models.decoder import causal_attention, check_tokens, mask_of
from dpdist.models.families import Family
from dpdist.models.nnx_model import compute_dtype, from_nnx
from dpdist.models.pretrained import LINEAR, SAME, Naming, Tensors, with_weights
from dpdist.models.transformer import embed

INIT = nnx.initializers.normal(0.02)
#: Styles, and `transformers`' names of their activations.
ACTIVATIONS = {"llama": "silu", "gemma": "gelu_pytorch_tanh"}


class _RmsNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * (offset + scale), in float32 (Zhang & Sennrich 2019); the offset is Gemma's."""

    def __init__(self, width: int, epsilon: float, offset: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset))
        self.epsilon, self.offset, self.dtype = epsilon, offset, dtype

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (self.offset + self.scale[...])).astype(self.dtype)


def rotate(x: Array, theta: float) -> Array:
    """Return rotary position embeddings of x [length, heads, d] (Su et al. 2021), in float32, with the dtype of x.

    Number i of the first half and number i of the second are turned by position * theta^(-2i/d), which is
    `transformers`' order of the numbers; the paper turns neighbours.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(len(x), dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class _Attention(nnx.Module):
    def __init__(
        self, width: int, heads: int, groups: int, head: int, theta: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        def linear(inner: int, outer: int) -> nnx.Linear:
            return nnx.Linear(inner, outer, use_bias=False, kernel_init=INIT, dtype=dtype, rngs=rngs)

        self.query, self.out = linear(width, heads * head), linear(heads * head, width)
        self.key, self.value = linear(width, groups * head), linear(width, groups * head)
        self.head, self.theta = head, theta

    def __call__(self, x: Array, mask: Array | None) -> Array:
        q, k, v = (p(x).reshape(len(x), -1, self.head) for p in (self.query, self.key, self.value))
        return self.out(causal_attention(rotate(q, self.theta), rotate(k, self.theta), v, mask))


class _GatedMlp(nnx.Module):
    """shrink(act(gate(x)) * grow(x)), where act is SiLU or the GELU by tanh (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, style: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(inner: int, outer: int) -> nnx.Linear:
            return nnx.Linear(inner, outer, use_bias=False, kernel_init=INIT, dtype=dtype, rngs=rngs)

        self.gate, self.grow, self.shrink = linear(width, inner), linear(width, inner), linear(inner, width)
        self.style = style

    def __call__(self, x: Array) -> Array:
        gate = self.gate(x)
        gate = jax.nn.silu(gate) if self.style == "llama" else jax.nn.gelu(gate, approximate=True)
        return self.shrink(gate * self.grow(x))


class _Layer(nnx.Module):
    def __init__(self, sizes: dict[str, Any], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, style = sizes["width"], sizes["style"]
        offset = 1.0 if style == "gemma" else 0.0
        self.norm1 = _RmsNorm(width, sizes["epsilon"], offset, dtype)
        self.attention = _Attention(
            width, sizes["heads"], sizes["kv_heads"], sizes["head_width"], sizes["theta"], dtype, rngs
        )
        self.norm2 = _RmsNorm(width, sizes["epsilon"], offset, dtype)
        self.mlp = _GatedMlp(width, sizes["mlp"], style, dtype, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class _Llama(nnx.Module):
    def __init__(self, sizes: dict[str, Any], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, vocabulary, gemma = sizes["width"], sizes["vocabulary"], sizes["style"] == "gemma"
        self.words = nnx.Param(INIT(rngs.params(), (vocabulary, width)))
        self.layers = nnx.List([_Layer(sizes, dtype, rngs) for _ in range(sizes["depth"])])
        self.norm = _RmsNorm(width, sizes["epsilon"], 1.0 if gemma else 0.0, dtype)
        self.unembed = (
            None
            if sizes["tied"]
            else nnx.Linear(
                width,
                vocabulary,
                use_bias=False,
                kernel_init=INIT,
                dtype=dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )
        )
        self.factor, self.dtype = width**0.5 if gemma else 1.0, dtype

    def __call__(self, example: dict[str, Array]) -> Array:
        mask = mask_of(example)
        x = (embed(self.words[...], example["input_ids"]) * self.factor).astype(self.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if self.unembed is not None:
            return self.unembed(x)
        return jnp.dot(x, self.words[...].astype(self.dtype).T, preferred_element_type=jnp.float32)


def llama(
    *,
    example: dict[str, jax.ShapeDtypeStruct],
    pretrained: str | None = None,
    dtype: str = "float32",
    vocabulary: int | None = None,
    positions: int = 2048,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_width: int | None = None,
    mlp: int | None = None,
    theta: float = 10000.0,
    epsilon: float = 1e-6,
    tied: bool | None = None,
    style: str = "llama",
) -> Model:
    """Build a language model of `example["input_ids"]`, int[length], with logits float32[length, vocabulary].

    RMSNorm, rotary position embeddings, heads that share keys and values, a gated MLP, no bias. It uses
    `example["attention_mask"]`, int[length], if the data has it. With the same weights, the logits equal those of
    `LlamaForCausalLM`, or of `GemmaForCausalLM` with `style: gemma`, in Hugging Face's `transformers`.

    Args:
        example: shapes and dtypes of one example.
        pretrained: path of local weights under `transformers`' names; None means random initial weights. Sizes that
            are not given come from the `config.json` beside them.
        dtype: `float32` or `bfloat16`, for matrix products; parameters, norms and logits are float32.
        vocabulary: number of token ids, a public constant.
        positions: length of the longest possible sequence.
        width: width of a token.
        depth: number of layers.
        heads: number of attention heads.
        kv_heads: number of keys and values, each shared by heads / kv_heads heads; None means as many as heads.
        head_width: width of a head; None means width / heads.
        mlp: inner width of the MLPs.
        theta: base of the rotary embeddings' wavelengths.
        epsilon: added to the mean square in the norms.
        tied: whether the output layer is the table of words; None means as the style has it, for gemma alone.
        style: `gemma` multiplies the words by sqrt(width), norms by 1 + scale, and has GELU in the MLP, not SiLU.

    Raises:
        ValueError: an option is missing or out of range, or the data has no column `input_ids` of shape [length].
    """
    sizes = completed_sizes(
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp=mlp,
        theta=theta,
        epsilon=epsilon,
        tied=tied,
        style=style,
    )
    check_tokens(example, "llama", positions)
    products = compute_dtype(dtype)
    model = from_nnx(lambda rngs: _Llama(sizes, products, rngs), lambda e: e)
    return with_weights(model, pretrained, naming(sizes["depth"], sizes["tied"]))


SIZES = ("vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp", "theta", "epsilon", "tied", "style")


def completed_sizes(**sizes: Any) -> dict[str, Any]:
    """Return the options of `llama` that fix its function, with what None stands for.

    Raises:
        ValueError: a size is missing or out of range.
    """
    if missing := [name for name in ("vocabulary", "width", "depth", "heads", "mlp") if sizes[name] is None]:
        raise ValueError(f"{missing[0]} is missing; give it, or pretrained weights with a config.json beside them")
    if sizes["style"] not in ACTIVATIONS:
        raise ValueError(f"style {sizes['style']!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    width, heads = sizes["width"], sizes["heads"]
    if sizes["kv_heads"] is None:
        sizes["kv_heads"] = heads
    if heads % sizes["kv_heads"]:
        raise ValueError(f"{heads} heads are not a multiple of {sizes['kv_heads']} kv_heads")
    if sizes["head_width"] is None:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        sizes["head_width"] = width // heads
    if sizes["head_width"] % 2:
        raise ValueError(f"head_width {sizes['head_width']} is not even, as rotary embeddings need it")
    if sizes["tied"] is None:
        sizes["tied"] = sizes["style"] == "gemma"
    return sizes


def naming(depth: int, tied: bool) -> Naming:
    """Return the tensor names of `transformers`."""
    tensors: Tensors = {"words": ("embed_tokens.weight", SAME), "norm.scale": ("norm.weight", SAME)}
    for i in range(depth):
        ours, theirs = f"layers.{i}", f"layers.{i}"
        tensors[f"{ours}.norm1.scale"] = (f"{theirs}.input_layernorm.weight", SAME)
        tensors[f"{ours}.norm2.scale"] = (f"{theirs}.post_attention_layernorm.weight", SAME)
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            tensors[f"{ours}.attention.{name}.kernel"] = (f"{theirs}.self_attn.{letter}_proj.weight", LINEAR)
        for name, word in (("gate", "gate"), ("grow", "up"), ("shrink", "down")):
            tensors[f"{ours}.mlp.{name}.kernel"] = (f"{theirs}.mlp.{word}_proj.weight", LINEAR)
    copies = {"lm_head.weight": "embed_tokens.weight"}
    if not tied:
        tensors["unembed.kernel"], copies = ("lm_head.weight", LINEAR), {}
    # Older files hold the rotary frequencies too.
    return Naming(
        tensors=tensors, prefix="model.", unprefixed=("lm_head.",), ignored=("*rotary_emb.inv_freq",), copies=copies
    )


def _prepare(said: dict[str, Any]) -> dict[str, Any]:
    """Spell out what a config.json leaves to the library, and both places of the rotary embeddings' settings."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    gemma = said["model_type"] == "gemma"
    usual = ACTIVATIONS["gemma" if gemma else "llama"]
    activation = (said.get("hidden_activation") if gemma else None) or said.get("hidden_act", usual)
    defaults = {"tie_word_embeddings": gemma}
    return (
        defaults
        | said
        | {
            "rope_theta": rope.get("rope_theta", said.get("rope_theta")),
            "rope_scaling": rope if _is_scaled(rope) else None,
            "hidden_act": activation if activation == usual else f"{activation} in a {said['model_type']}",
            "style": "gemma" if gemma else "llama",
        }
    )


def _is_scaled(rope: dict[str, Any]) -> bool:
    """Whether the settings of rotary embeddings ask for more than a `theta`."""
    kind = rope.get("rope_type", rope.get("type"))
    return kind != "default" if kind is not None else bool(rope.keys() - {"rope_theta", "partial_rotary_factor"})


def _finish(said: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_prepare`, with the rotary embeddings' settings where old and new versions look for them."""
    said = {key: value for key, value in said.items() if key not in ("style", "partial_rotary_factor")}
    said |= {
        "hidden_act": ACTIVATIONS[options["style"]],
        "rope_parameters": {"rope_type": "default", "rope_theta": options["theta"]},
    }
    if options["style"] == "gemma":
        activation = ACTIVATIONS["gemma"]
        said |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_activation": activation}
    return said


FAMILY = Family(
    model_types=("llama", "mistral", "gemma"),
    architecture="LlamaForCausalLM",
    keys={
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "mlp": "intermediate_size",
        "theta": "rope_theta",
        "epsilon": "rms_norm_eps",
        "tied": "tie_word_embeddings",
        "style": "style",
    },
    fixed={
        "hidden_act": tuple(ACTIVATIONS.values()),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0, None),
        "sliding_window": (None,),
        "use_bidirectional_attention": (False, None),
    },
    prepare=_prepare,
    complete=lambda options: options | completed_sizes(**{name: options[name] for name in SIZES}),
    finish=_finish,
)
