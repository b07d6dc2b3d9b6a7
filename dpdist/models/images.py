"""Images on their way into a model, prepared on the device: the host reads and sends them as they are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def prepare_image(example: dict[str, Array], *, offset: float, scale: float, size: int | None = None) -> Array:
    """`(image - offset) / scale` in float32[height, width, channels], resized to `size` by `size` where it differs.

    Offset and scale are public constants: statistics of private data are not. Resizing is bilinear, with
    antialiasing where the image shrinks, so 32x32 bytes are sent to the device and not 224x224.
    """
    image = example["image"].astype(jnp.float32)
    if size is not None and image.shape[:2] != (size, size):
        image = jax.image.resize(image, (size, size, image.shape[-1]), "bilinear")
    return (image - offset) / scale


def check_image(example: dict[str, jax.ShapeDtypeStruct], model: str) -> int:
    """The channels of `example["image"]`, which has to be [height, width, channels]; ValueError if it is not."""
    shape = example["image"].shape if "image" in example else None
    if shape is None or len(shape) != 3:
        raise ValueError(f"{model} needs a column 'image' of shape [height, width, channels], not {shape}")
    return shape[-1]
