"""Convolutions with standardised weights, as in BiT.

Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

#: Epsilon of `timm`, whose weights we read; the paper's code uses 1e-10.
WEIGHT_EPSILON = 1e-8


class StandardisedConv(nnx.Module):
    """A convolution whose kernel has mean 0 and variance 1 over each output channel's inputs."""

    def __init__(
        self, size: int, channels: int, out: int, dtype: DTypeLike, rngs: nnx.Rngs, *, stride: int = 1
    ) -> None:
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, size, channels, out)))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Array) -> Array:
        """Return the outputs [height, width, out] of one image [height, width, in]."""
        kernel = self.kernel[...]
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        return self.convolved(x, (kernel - mean) * jax.lax.rsqrt(variance + WEIGHT_EPSILON))

    def convolved(self, x: Array, kernel: Array) -> Array:
        """Return the convolution of x [height, width, in] with a kernel [size, size, in, any] as it is."""
        pad = (kernel.shape[0] // 2,) * 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype)[None],
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
