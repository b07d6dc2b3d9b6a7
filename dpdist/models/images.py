"""Prepare images on the device, so that the host only reads and sends them as they are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def prepare_image(example: dict[str, Array], *, offset: float, scale: float, size: int | None = None) -> Array:
    """Return `(image - offset) / scale` as float32[height, width, channels], resized to `size` by `size` if given.

    Offset and scale must be public constants; statistics of private data are not public. Resizing is bilinear, with
    antialiasing if the image shrinks. It runs on the device, so a 32x32 image is sent there at its own size, not at
    224x224.
    """
    image = example["image"].astype(jnp.float32)
    if size is not None and image.shape[:2] != (size, size):
        image = jax.image.resize(image, (size, size, image.shape[-1]), "bilinear")
    return (image - offset) / scale


def usual_scale(example: dict[str, jax.ShapeDtypeStruct], model: str) -> float:
    """Return 255 for images of bytes, and 1 for those of other numbers, which are taken to be scaled already.

    Raises:
        ValueError: there is no column `image`.
    """
    if "image" not in example:
        raise ValueError(f"{model} needs a column 'image'; there are {', '.join(example)}")
    return 255.0 if example["image"].dtype == jnp.uint8 else 1.0


def check_image(example: dict[str, jax.ShapeDtypeStruct], model: str) -> int:
    """Return the number of channels of `example["image"]`; ValueError unless it is [height, width, channels]."""
    shape = example["image"].shape if "image" in example else None
    if shape is None or len(shape) != 3:
        raise ValueError(f"{model} needs a column 'image' of shape [height, width, channels], not {shape}")
    return shape[-1]
