"""Images of Pillow as pixels: upright, without transparency, one byte per channel."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "CMYK": 3, "YCbCr": 3}
"""Pillow's modes with one byte per channel, and their numbers of channels without transparency."""


def lossy(image: "Image") -> Iterator[tuple[str, str]]:
    """Yield the kinds of content that are lost, each with a sentence about it."""
    # a camera adds a preview to its photo as a second frame
    if getattr(image, "is_animated", False) and image.format != "MPO":
        yield "animated", "has several frames, of which the first one is used; save it alone"
    if image.mode == "CMYK":
        yield (
            "CMYK",
            "has CMYK colors, which are converted without their profile; save it as RGB",
        )


def upright(image: "Image") -> "Image":
    """Return an image turned as its orientation tag says; a camera stores how it was held."""
    from PIL import ExifTags, ImageOps

    orientation = 1
    with suppress(Exception):  # a damaged tag does not damage the pixels
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def transparent(image: "Image") -> "Image | None":
    """Return an image in RGBA if one of its pixels is transparent, else None."""
    if not image.has_transparency_data:
        return None
    layer = image.convert("RGBA")
    lowest, _ = layer.getchannel("A").getextrema()
    return None if lowest == 255 else layer


def laid_on(level: int, layer: "Image") -> "Image":
    """Return an RGBA image over a background of one brightness.

    Pixels under full transparency have any color, so that dropping it would show noise.
    """
    from PIL import Image

    canvas = Image.new("RGBA", layer.size, (level, level, level, 255))
    canvas.alpha_composite(layer)
    return canvas


def from_pillow(image: "Image") -> UInt8[Tensor, "channels height width"]:
    """Return the pixels of an image with one byte per channel."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, -1).permute(2, 0, 1).contiguous()
