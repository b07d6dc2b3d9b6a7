"""Random changes of training images, on the device: flips and shifted crops, for the views of `training.views`.

They are those of De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale"
(section 3.2): pad by reflection, crop back at random, and mirror half of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpdist.config.plugins import load_function
from dpdist.errors import InputError

#: `f(example, key) -> example`: one training example, without its own `key`, and a key for what is random.
Augmentation = Callable[[dict[str, Array], Array], dict[str, Array]]


def augmentation(name: str, options: Mapping[str, int], example: Mapping[str, jax.ShapeDtypeStruct]) -> Augmentation:
    """The augmentation that `training.augment` names.

    Args:
        name: `flip`, `crop`, `flip_and_crop`, or `module:function` taking (example, key) to an example.
        options: `{padding: 4}`, the pixels by which `crop` may move an image; keyword arguments of an own function.
        example: shapes and dtypes of one example, by column.

    Raises:
        InputError: there is no such augmentation, it has no such option, or the example has no image.
    """
    if name not in ("flip", "crop", "flip_and_crop"):
        function = load_function(name, "training.augment", ["flip", "crop", "flip_and_crop"])
        return (lambda example, key: function(example, key, **options)) if options else function
    padding = options.get("padding", 4)
    if set(options) - {"padding"} or type(padding) is not int or padding < 1:
        raise InputError("training.augment_options", dict(options), "give {padding: PIXELS}, at least 1.")
    image = example.get("image")
    least = padding + 1 if "crop" in name else 1
    if image is None or len(image.shape) != 3 or min(image.shape[:2]) < least:
        shape = None if image is None else list(image.shape)
        remedy = f"it needs a column 'image' of shape [height, width, channels], {least} pixels or more, not {shape}."
        raise InputError("training.augment", name, remedy)

    def augment(example: dict[str, Array], key: Array) -> dict[str, Array]:
        for_flip, for_crop = jax.random.split(key)
        image = example["image"]
        if "crop" in name:
            image = _cropped(image, for_crop, padding)
        if "flip" in name:
            image = jnp.where(jax.random.bernoulli(for_flip), image[:, ::-1], image)
        return example | {"image": image}

    return augment


def _cropped(image: Array, key: Array, padding: int) -> Array:
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
