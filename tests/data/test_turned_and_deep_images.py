"""Images are decoded as viewers show them: turned as their EXIF data say, and with the whole range from 0 to 255."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dpdist.data.images import Images
from dpdist.errors import InputError

#: How EXIF's numbers turn what is stored: 3 by half a turn, 5 to 8 so that height becomes width.
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


def decoded(content: bytes, **options: object) -> np.ndarray:
    return Images(lambda index: content, 1, name=str, **options).decode(0)["image"]  # type: ignore[arg-type]


def encoded(pixels: np.ndarray, form: str, orientation: object = None, exif: bytes | None = None) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if orientation is not None:
        tags = Image.Exif()
        tags[0x0112] = orientation
        exif = tags.tobytes()
    image.save(file, form, **({} if exif is None else {"exif": exif}))
    return file.getvalue()


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """uint16[height, width] or uint16[height, width, 3]: Pillow writes no such colours."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    framed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_an_image_is_turned_as_its_exif_data_say(orientation: int, form: str) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :16], stored[16:, 48:] = (250, 0, 0), (0, 0, 250)
    wanted = TURNS[orientation](stored)
    content = encoded(stored, form, orientation)
    found = decoded(content)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 6  # of a JPEG
    # A JPEG is decoded to a fraction of its size at once: of a turned one, of the right side.
    half = decoded(content, size=[side // 2 for side in wanted.shape[:2]])
    assert np.abs(half.astype(int) - wanted[::2, ::2]).mean() < 12


@pytest.mark.parametrize("exif", [{"orientation": 9}, {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}])
def test_an_orientation_that_cannot_be_read_turns_nothing(exif: dict[str, object]) -> None:
    stored = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(decoded(encoded(stored, "PNG", **exif)), stored)  # type: ignore[arg-type]


def test_of_16_bits_colours_keep_their_range_and_gray_is_refused() -> None:
    colours = np.array([[[0, 255, 256], [32768, 65280, 65535]]], np.uint16)
    np.testing.assert_array_equal(decoded(png_of_16_bits(colours)), [[[0, 0, 1], [128, 255, 255]]])
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        decoded(png_of_16_bits(colours[..., 0]))
