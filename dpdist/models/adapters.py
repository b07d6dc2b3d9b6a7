"""Layers with a low-rank branch beside them, and which layers can have one.

A is of the kernel's shape but for its outputs, of which there are `rank`; B [rank, out] follows at every position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpdist.config.lora import Lora
from dpdist.models.standardised import StandardisedConv

#: Names of the factors, beside the kernel.
A, B = "lora_a", "lora_b"


class _Adapter(nnx.Module):
    """What all have in common: parameters of a layer that is there stay in place, the factors are added."""

    def __init__(self, layer: Any, lora: Lora) -> None:
        for name, value in vars(layer).items():
            if not name.startswith("_") and name not in vars(type(self)):
                setattr(self, name, value)
        *inputs, out = layer.kernel.shape
        # Both are given their values by `with_lora`.
        self.lora_a = nnx.Param(jnp.zeros((*inputs, lora.rank), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, out), jnp.float32))
        self.scale = lora.scale

    def factors(self, dtype: Any) -> tuple[Array, Array]:
        return self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)


class LoraLinear(_Adapter, nnx.Linear):
    """x W + b + scale (x A) B, with A [in, rank] and B [rank, out].

    The products of the factors have the dtype of the layer's.
    """

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Return the outputs [..., out] of inputs [..., in]."""
        outputs = super().__call__(inputs, out_sharding=out_sharding)
        dtype = self.dtype or inputs.dtype
        a, b = self.factors(dtype)
        return outputs + (((inputs.astype(dtype) @ a) * self.scale) @ b).astype(outputs.dtype)


class LoraConv(_Adapter, nnx.Conv):
    """conv(x, W) + b + scale conv(x, A) B, with A [*window, in, rank] and B [rank, out]."""

    def conv_general_dilated(self, inputs: Array, kernel: Array, *args: Any, **settings: Any) -> Array:
        """Return the outputs without bias; `nnx.Conv` calls it with padded inputs, strides and dilations."""
        a, b = self.factors(kernel.dtype)
        outputs, narrow = (jax.lax.conv_general_dilated(inputs, each, *args, **settings) for each in (kernel, a))
        return outputs + ((narrow * self.scale) @ b).astype(outputs.dtype)


class LoraStandardisedConv(_Adapter, StandardisedConv):
    """conv(x, standardised W) + scale conv(x, A) B: A is as it is, so that no kernel in W's place gives the same."""

    def __call__(self, x: Array) -> Array:
        """Return the outputs [height, width, out] of one image [height, width, in]."""
        a, b = self.factors(self.dtype)
        return super().__call__(x) + ((self.convolved(x, a) * self.scale) @ b)


#: The layers that take adapters, and these. A subclass may compute anything, so none does.
ADAPTERS: Mapping[type[nnx.Module], type[_Adapter]] = {
    nnx.Linear: LoraLinear,
    nnx.Conv: LoraConv,
    StandardisedConv: LoraStandardisedConv,
}
#: What a layer can be given to compute with in the place of the usual.
_USUAL = {
    "dot_general": jax.lax.dot_general,
    "conv_general_dilated": jax.lax.conv_general_dilated,
    "promote_dtype": nnx.nn.dtypes.promote_dtype,
}


def obstacle(layer: Any) -> str:
    """Why a layer with a kernel takes no adapter; empty if it takes one."""
    if type(layer) not in ADAPTERS:
        return f"which is of {type(layer).__name__}, no nnx.Linear or nnx.Conv"
    for name, usual in _USUAL.items():
        if getattr(layer, name, usual) is not usual:
            return f"whose layer has a {name} of its own"
    declared = layer.kernel.shape
    if isinstance(layer, nnx.Linear):
        declared = (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.Conv):
        declared = layer.kernel_shape
        if layer.feature_group_count > 1:
            return f"whose layer has feature_group_count {layer.feature_group_count}"
        if layer.mask is not None:
            return "whose layer has a mask"
    return "" if layer.kernel.shape == declared else f"which holds several layers, as {list(layer.kernel.shape)}"
