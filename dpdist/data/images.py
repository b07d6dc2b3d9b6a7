"""Image files (PNG, JPEG, ...) as arrays: decoded by Pillow when an example is read, cut to one size if asked.

An image is turned as its EXIF data say, which is how every viewer shows it. Of 16 bits a channel, PNGs in colour give
the upper 8, so that the whole range is from 0 to 255; in gray, whose values are often those of an instrument and fill a
part of the range, they are refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpdist.data import optional
from dpdist.data.native_output import silent_descriptor
from dpdist.errors import InputError

#: Pillow's name of a mode, and its channels.
MODES = {"rgb": ("RGB", 3), "grayscale": ("L", 1)}
#: File names of images end so, in any case.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Pillow's modes of more than 8 bits a channel, which a conversion to 8 bits would cut off.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
#: EXIF's tag for how an image is to be turned: 1 is not at all, and from 5 on its height becomes its width.
_ORIENTATION, _SIDEWAYS = 0x0112, 5


class Images:
    """Encoded images, decoded to `column`: uint8[height, width, channels].

    Args:
        read: returns the bytes of the image at an index.
        length: number of images.
        name: says where the image at an index is stored.
        identity: whatever tells these images from others without reading them; may be empty.
        column: the column's name.
        size: `[height, width]`, or one number for both: an image is scaled until it covers that (bilinear, with
            antialiasing), and its centre is cut out. None takes images as they are, which then all need one size.
        mode: `rgb` or `grayscale`; any image is converted.

    Raises:
        InputError: an option is none of these, or Pillow is not installed.
    """

    kind = "an image"

    def __init__(
        self,
        read: Callable[[int], bytes],
        length: int,
        *,
        name: Callable[[int], str],
        identity: str = "",
        column: str = "image",
        size: Any = None,
        mode: str = "rgb",
    ) -> None:
        self._pillow = optional.load("PIL.Image", "images")
        self._ops = optional.load("PIL.ImageOps", "images")
        self._size = _size(size)
        if mode not in MODES:
            raise InputError("data.options.mode", mode, f"give one of {', '.join(MODES)}.")
        self._mode, self.channels = MODES[mode]
        self.stored, self._length, self.name, self._column = read, length, name, column
        self.identity = f"{identity} {column} {self._size} {mode}"
        #: Of the first image that was decoded, when the source was opened: all others need the same.
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self._length

    def decode(self, index: int) -> dict[str, np.ndarray]:
        """The image at an index.

        Raises:
            InputError: its size is another one than that of the first image, or it has more than 8 bits.
        """
        pixels = self._pixels(self.stored(index))
        if self._shape is None:
            self._shape = pixels.shape
        if pixels.shape != self._shape:
            raise InputError(
                "data.options.size",
                None,
                "the images differ in size; give the [height, width] that all are to be scaled and cut to, such as "
                "[224, 224].",
            )
        return {self._column: pixels}

    def _pixels(self, content: bytes) -> np.ndarray:
        try:
            opened = self._pillow.open(io.BytesIO(content))
        except self._pillow.UnidentifiedImageError:
            raise ValueError("no image of a format that Pillow knows") from None
        with opened as image:
            if image.mode in _DEEP:
                raise InputError(
                    "data.source",
                    "an image of more than 8 bits a channel",
                    "save the images with 8 bits, from 0 to 255.",
                )
            orientation = _orientation(image)
            if self._size is not None:
                # JPEG decodes to a half, a quarter or an eighth at once; twice the size wanted hides that.
                height, width = self._size if orientation < _SIDEWAYS else self._size[::-1]
                image.draft(self._mode, (2 * width, 2 * height))
            # libtiff writes what it finds wrong with an image to descriptor 2, and goes on.
            with silent_descriptor() if image.format == "TIFF" else contextlib.nullcontext():
                if orientation > 1:
                    image = self._ops.exif_transpose(image)
                image = image.convert(self._mode)
            if self._size is not None and image.size != self._size[::-1]:
                image = self._ops.fit(image, self._size[::-1], self._pillow.Resampling.BILINEAR)
            return np.asarray(image).reshape(image.height, image.width, self.channels)


def _orientation(image: Any) -> int:
    """How an image is to be turned, 1 to 8; 1 where it does not say, or not in a way that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels of an image whose EXIF data are damaged are whole, and viewers show them
        return 1
    return found if found in range(1, 9) else 1


def _size(size: Any) -> tuple[int, int] | None:
    """`[height, width]` as a tuple.

    Raises:
        InputError: it is none.
    """
    if size is None:
        return None
    both: Sequence[Any] = size if isinstance(size, list | tuple) else (size, size)
    if len(both) != 2 or any(type(side) is not int or not 1 <= side <= 16384 for side in both):
        raise InputError("data.options.size", size, "give [height, width] in pixels, or one number for both.")
    return both[0], both[1]
