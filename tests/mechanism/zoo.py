"""Many kinds of losses, each with parameters and a batch of six: cases that a clipping method could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

Loss = Callable[[Any, Any], Any]
Case = tuple[Loss, Any, Any]
EXAMPLES = 6


def normal(seed: int, *shape: int, scale: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def images(*shape: int) -> dict[str, np.ndarray]:
    return {"x": normal(1, EXAMPLES, *shape, scale=1.0)}


def tokens(length: int, vocabulary: int) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(2).integers(0, vocabulary, (EXAMPLES, length)).astype(np.int32)}


def tied_embeddings() -> Case:
    """A table used for lookup, for a product and for a transposed product; tokens repeat."""
    params = {"table": normal(3, 9, 5), "w": normal(4, 5, 5)}

    def loss(params: Any, example: Any) -> Any:
        h = jnp.tanh(params["table"][example["ids"]] @ params["w"])
        logits = h @ params["table"].T + 0.3 * jnp.einsum("td,vd->tv", h * h, params["table"])
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(7), example["ids"]])

    return loss, params, tokens(7, 9)


def out_of_range(mode: str) -> Case:
    """Indices outside the table: filled with a constant, or clamped to its ends, with a gradient there or without."""
    batch = {"ids": np.array([[0, 4, 7], [-1, 1, 1], [5, 5, 5], [9, 9, 0], [4, 3, 2], [4, 4, 4]], np.int32)}

    def loss(params: Any, example: Any) -> Any:
        rows = jnp.asarray(params["table"]).at[example["ids"]].get(mode=mode, fill_value=0.5)
        return jnp.sum(jnp.sin(rows * params["scale"]))

    return loss, {"table": normal(5, 5, 4), "scale": normal(6, 4)}, batch


def weight_standardisation() -> Case:
    params = {"kernel": normal(7, 3, 3, 2, 6), "gain": normal(8, 6)}

    def loss(params: Any, example: Any) -> Any:
        k = params["kernel"]
        k = (k - k.mean((0, 1, 2))) / jnp.sqrt(k.var((0, 1, 2)) + 1e-6) * params["gain"]
        y = lax.conv_general_dilated(example["x"][None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(y))

    return loss, params, images(5, 5, 2)


def convolution(**how: Any) -> Case:
    groups = how.get("feature_group_count", 1)
    numbers = how.pop("numbers", ("NHWC", "HWIO", "NHWC"))
    kernel = {"HWIO": (3, 2, 4 // groups, 6), "OIHW": (6, 4 // groups, 3, 2)}[numbers[1]]
    image = {"NHWC": (7, 8, 4), "NCHW": (4, 7, 8)}[numbers[0]]
    params = {"kernel": normal(9, *kernel), "bias": normal(10, 6)}

    def loss(params: Any, example: Any) -> Any:
        y = lax.conv_general_dilated(
            example["x"][None], params["kernel"], **{"window_strides": (1, 1), "padding": "SAME"} | how,
            dimension_numbers=numbers,
        )  # fmt: skip
        channels = numbers[2].index("C")
        return jnp.sum(jnp.tanh(y + params["bias"].reshape([6 if i == channels else 1 for i in range(4)])) ** 2)

    return loss, params, images(*image)


def group_counts() -> Case:
    """One kernel, used on 2 channels as a whole and on 4 channels in two groups."""

    def loss(params: Any, example: Any) -> Any:
        convolve = partial(
            lax.conv_general_dilated,
            rhs=params["kernel"],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        whole = convolve(example["x"][None, ..., :2], feature_group_count=1)
        return jnp.sum(jnp.tanh(whole + convolve(example["x"][None], feature_group_count=2)) ** 2)

    return loss, {"kernel": normal(9, 3, 2, 2, 6)}, images(5, 6, 4)


def patches() -> Case:
    """Windows that tile the image, as in a vision transformer, over two rows of images at once."""
    params = {"kernel": normal(9, 2, 4, 3, 5)}

    def loss(params: Any, example: Any) -> Any:
        y = lax.conv_general_dilated(
            example["x"], params["kernel"], (2, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.tanh(y))

    return loss, params, images(2, 6, 8, 3)


def scanned_layers(*, remat: bool, length: int = 3, reverse: bool = False) -> Case:
    params = {"w": normal(11, length, 6, 6), "b": normal(12, length, 6), "shared": normal(13, 6, 6)}

    def loss(params: Any, example: Any) -> Any:
        def layer(h: Any, p: Any) -> Any:
            h = jnp.tanh(h @ p["w"] + p["b"]) + 0.3 * h @ params["shared"]
            return h, jnp.sum(h * h)

        h, squares = lax.scan(
            jax.checkpoint(layer) if remat else layer,
            example["x"],
            {"w": params["w"], "b": params["b"]},
            reverse=reverse,
        )
        return jnp.sum(h) + jnp.sum(jnp.sqrt(squares + 1.0) * jnp.arange(1.0, length + 1))

    return loss, params, images(4, 6)


def long_recurrence() -> Case:
    params = {"w": normal(14, 5, 5), "u": normal(15, 5)}

    def loss(params: Any, example: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return jnp.tanh(params["w"] @ h + x * params["u"]), None

        return jnp.sum(lax.scan(step, jnp.zeros(5), example["x"])[0] ** 2)

    return loss, params, images(60)


def rematerialised() -> Case:
    params = {"a": normal(16, 6, 8), "b": normal(17, 8, 6)}

    def loss(params: Any, example: Any) -> Any:
        @jax.checkpoint
        def block(h: Any) -> Any:
            return h + jax.nn.gelu(h @ params["a"]) @ params["b"]

        return jnp.sum(block(block(example["x"])) ** 2)

    return loss, params, images(4, 6)


def control_flow() -> Case:
    """Branches that contain parameters, chosen by parameters and by data."""
    params = {"gate": np.float32(0.37), "w": normal(18, 4, 4), "v": normal(19, 4, 4)}

    def loss(params: Any, example: Any) -> Any:
        x = example["x"]
        x = lax.cond(params["gate"] > 0, lambda x: x @ params["w"], lambda x: x @ params["v"], x)
        x = lax.cond(jnp.sum(example["x"]) > 0, lambda x: jnp.tanh(x @ params["w"]), lambda x: x * params["gate"], x)
        x = lax.switch(example["ids"][0] % 3, [jnp.sin, lambda x: x @ params["v"], lambda x: x * 2.0], x)
        count = lax.while_loop(lambda n: n < params["gate"] * 10, lambda n: n + 1.0, 0.0)
        x = jnp.where(params["w"] > 0, x[:4], 0.5 * x[:4]) * lax.stop_gradient(count + params["v"])
        return jnp.sum(x * x) * jnp.maximum(params["gate"], x[0, 0])

    return loss, params, images(4, 4) | tokens(2, 9)


def experts() -> Case:
    params = {"up": normal(20, 3, 4, 5), "down": normal(21, 5, 3, 2)}

    def loss(params: Any, example: Any) -> Any:
        h = jnp.tanh(jnp.einsum("tgi,gio->gto", example["x"], params["up"]))
        return jnp.sum(jnp.einsum("gto,ogk->kgt", h, params["down"]) ** 2)

    return loss, params, images(4, 3, 4)


def odd_corners() -> Case:
    """A scalar, an unused and an empty parameter; a penalty on the parameters; a mean over an integer input."""
    params = {
        "scale": np.float32(0.7), "unused": normal(22, 3), "empty": np.zeros((0, 3), np.float32), "w": normal(23, 5, 3),
    }  # fmt: skip

    def loss(params: Any, example: Any) -> Any:
        h = example["ids"].astype(jnp.float32) @ params["w"]
        return params["scale"] * jnp.mean(h**2) + 0.1 * jnp.sum(params["w"] ** 2) + jnp.exp(params["scale"])

    return loss, params, tokens(5, 4)


def low_rank() -> Case:
    """A weight that is a sum of two, one of them a product."""
    params = {"w": normal(24, 6, 5), "a": normal(25, 6, 2), "b": normal(26, 2, 5)}
    return lambda p, e: jnp.sum(jnp.tanh(e["x"] @ (p["w"] + p["a"] @ p["b"])) ** 2), params, images(4, 6)


def slices() -> Case:
    """Slices of one parameter: disjoint, identical and overlapping; with static and with constant dynamic indices."""
    params = {
        "stack": normal(27, 4, 6, 6), "position": normal(28, 9, 6), "overlap": normal(29, 8, 6),
        "clamped": normal(26, 3, 6, 6), "halves": normal(25, 8, 6), "sliding": normal(24, 8, 6),
    }  # fmt: skip

    def loss(params: Any, example: Any) -> Any:
        h = example["x"] + params["position"][:4]
        for layer in (0, 2, 2, 3):
            h = jnp.tanh(h @ params["stack"][layer])
        h = h @ lax.dynamic_slice(params["clamped"], (7, 0, 0), (1, 6, 6))[0]  # the last one: XLA clamps the start
        h = h + jnp.tanh(h[:, :4]) @ params["halves"][:4] + jnp.sin(h[:, 2:]) @ params["halves"][4:]
        h = jnp.tanh(h @ params["sliding"][:6]) + jnp.sin(h @ params["sliding"][2:])
        h = h @ params["overlap"][:6] + h @ params["overlap"][2:]
        return jnp.sum(h[:, None] * params["overlap"][None, :4])

    return loss, params, images(4, 6)


def reshaped() -> Case:
    """A parameter stored in another shape; and the transpose of another parameter, used twice."""
    params = {"w": normal(30, 2, 3, 4), "v": normal(31, 6, 6)}

    def loss(params: Any, example: Any) -> Any:
        h = jnp.tanh(example["x"] @ params["w"].reshape(6, 4)) @ params["w"].reshape(6, 4).T
        return jnp.sum(jnp.tanh(h @ params["v"] @ params["v"].T) * (params["v"][:4] * 0.1))

    return loss, params, images(4, 6)


def own_derivatives() -> Case:
    """`custom_vjp` and `custom_jvp`, over parameters and data, whose rule is not the derivative of their formula."""

    @jax.custom_vjp
    def double_back(x: Any, w: Any) -> Any:
        return x @ w

    double_back.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, 2.0 * kept[0].T @ g))

    @jax.custom_jvp
    def straight_through(x: Any, w: Any) -> Any:
        return jnp.round(x * w)

    @straight_through.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x, w), (dx, dw) = primals, tangents
        return straight_through(x, w), dx * w + x * dw

    params = {"w": normal(32, 6, 5), "s": normal(33, 5)}
    loss = lambda p, e: jnp.sum(jnp.sin(straight_through(double_back(e["x"], p["w"]), p["s"])))  # noqa: E731
    return loss, params, images(4, 6)


def fourier() -> Case:
    """Real parameters combined with complex data."""
    params = {"w": normal(40, 5), "phase": normal(41, 5), "mix": normal(42, 8, 8), "turn": normal(43, 5, 5)}

    def loss(params: Any, example: Any) -> Any:
        spectrum = jnp.fft.rfft(example["x"] @ params["mix"])
        spectrum = spectrum @ params["turn"].astype(jnp.complex64)
        return jnp.sum(jnp.tanh(jnp.fft.irfft(spectrum * params["w"] * jnp.exp(1j * params["phase"]))))

    return loss, params, images(3, 8)


def mixed_precision() -> Case:
    """Parameters stored in float32 and used in bfloat16, by every kind of factor rule."""
    params = {"w": normal(34, 6, 8), "k": normal(35, 3, 1, 8, 4), "table": normal(36, 9, 6), "b": normal(37, 8)}

    def loss(params: Any, example: Any) -> Any:
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        h = jnp.tanh(p["table"][example["ids"]] @ p["w"] + p["b"])
        y = lax.conv_general_dilated(
            h[None, :, None], p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return loss, params, tokens(7, 9)


def nnx_attention() -> Case:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(self.norm(x))
            return x + nnx.gelu(self.mlp(x))

    graph, state = nnx.split(Block(nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + normal(38, *x.shape, scale=0.3), nnx.to_pure_dict(state))

    def loss(params: Any, example: Any) -> Any:
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, params)
        return jnp.mean(nnx.merge(graph, own)(example["x"]) ** 2)

    return loss, params, images(5, 8)


def linen_cnn() -> Case:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.relu(linen.GroupNorm(num_groups=2)(linen.Conv(4, (3, 3), strides=2)(x[None])))
            x = linen.avg_pool(linen.Conv(6, (2, 2), kernel_dilation=2, feature_group_count=2)(x), (2, 2))
            return linen.Dense(3)(x.reshape(-1))

    params = Net().init(jax.random.key(0), jnp.zeros((8, 8, 2)))
    params = jax.tree.map(lambda x: np.asarray(x) + normal(39, *x.shape, scale=0.2), params)
    return lambda p, e: jnp.sum(Net().apply(p, e["x"]) ** 2), params, images(8, 8, 2)


def equinox_mlp() -> Case:
    model = equinox.nn.MLP(6, 3, 8, 2, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    return lambda p, e: jnp.sum(equinox.combine(p, static)(e["x"]) ** 2), params, images(6)


ZOO: dict[str, Callable[[], Case]] = {
    "tied embeddings": tied_embeddings,
    "filled": partial(out_of_range, "fill"),
    "clipped": partial(out_of_range, "clip"),
    "promised": partial(out_of_range, "promise_in_bounds"),
    "weight standardisation": weight_standardisation,
    "strided": partial(convolution, window_strides=(2, 3)),
    "dilated": partial(convolution, rhs_dilation=(2, 1), padding=((2, 1), (0, 3))),
    "grouped": partial(convolution, feature_group_count=2),
    "depthwise, valid": partial(convolution, feature_group_count=2, padding="VALID", window_strides=(2, 1)),
    "transposed": partial(convolution, lhs_dilation=(2, 2), padding=((-1, 2), (1, 1))),
    "channels first": partial(convolution, numbers=("NCHW", "OIHW", "NHWC"), feature_group_count=2),
    "two group counts": group_counts,
    "patches": patches,
    "scan": partial(scanned_layers, remat=False),
    "scan, remat, reversed": partial(scanned_layers, remat=True, reverse=True),
    "long recurrence": long_recurrence,
    "remat": rematerialised,
    "control flow": control_flow,
    "experts": experts,
    "odd corners": odd_corners,
    "low rank": low_rank,
    "slices": slices,
    "reshaped": reshaped,
    "own derivatives": own_derivatives,
    "fourier": fourier,
    "nnx attention": nnx_attention,
    "linen": linen_cnn,
    "equinox": equinox_mlp,
}
