"""Labelled image files: read one by one by a loader's workers, or all at once into memory."""

import copy
import math
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from bilevel import BilevelError
from bilevel.problems.datasets.standardize import Level

if TYPE_CHECKING:
    from PIL.Image import Image

Labelled: TypeAlias = tuple[UInt8[Tensor, "_n _channels _height _width"], Int[Tensor, " _n"]]
"""Images as stored, one byte a pixel, and their classes."""

MODES = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "CMYK": 3, "YCbCr": 3}
"""Pillow's modes of a byte a channel, and how many channels they have without transparency."""


class UnreadableImage(BilevelError):
    """A file that is no image, or none like the others.

    A DataLoader hands on a worker's error with its whole traceback for a message; this one keeps its sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@final
class Files(Dataset):
    """Image files and their classes; item i is (pixels [C, H, W] as bytes, class).

    Args:
        paths: one at least.
        labels: the class of each.
        size: the shorter side is brought to it, and a square cut from the middle; None leaves images as they are.
        channels: 1 or 3, to which all are converted; None for those that the first one has.
        workers: processes that read while training goes on, where the images do not lie in memory.

    Attributes:
        shape: channels, height and width of every image.

    Raises:
        BilevelError: a size or channels that mean nothing.
        UnreadableImage: the first file is no image.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Int[Tensor, " n"],
        *,
        size: int | None = None,
        channels: int | None = None,
        workers: int = 0,
    ) -> None:
        self.paths, self.labels, self.workers = list(paths), labels, workers
        self._size, self._channels, self._first = size, channels, str(paths[0])
        if channels not in (None, 1, 3):
            raise BilevelError(
                f"channels={channels!r} is neither 1, grey, nor 3, red, green and blue; choose one, or null"
            )
        if size is not None and not (type(size) is int and size >= 1):
            raise BilevelError(
                f"size={size!r} is no number of pixels; give a whole number, 1 or more, or null"
            )
        self.shape = (0, 0, 0)  # not known yet
        one, height, width = self.read(0).shape
        self.shape = (one, height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "channels height width"], int]:
        return self.read(index), int(self.labels[index])

    @property
    def nbytes(self) -> int:
        """Of all images, once they are decoded."""
        return len(self) * math.prod(self.shape)

    def taken(self, index: Sequence[int]) -> "Files":
        """Some of the files, in this order."""
        return self.beside([self.paths[i] for i in index], self.labels[list(index)])

    def beside(self, paths: Sequence[str], labels: Int[Tensor, " n"]) -> "Files":
        """Other files, of the same shape and read alike."""
        other = copy.copy(self)
        other.paths, other.labels = list(paths), labels
        return other

    def decoded(self) -> Labelled:
        """All of them in memory.

        Raises:
            UnreadableImage: one that is damaged, or of another shape.
        """
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def fill(index: int) -> None:
            pixels[index] = self.read(index)

        with ThreadPoolExecutor(
            min(8, os.cpu_count() or 1)
        ) as pool:  # Pillow decodes outside the interpreter's lock
            for _ in pool.map(fill, range(len(self))):
                pass
        return pixels, self.labels

    def read(self, index: int) -> UInt8[Tensor, "channels height width"]:
        """One image.

        Raises:
            UnreadableImage: it is damaged, has 16 bits a pixel, or is of another shape than the first one.
        """
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = self._pixels(image, path)
        except UnreadableImage:
            raise
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            Image.DecompressionBombError,
            struct.error,
        ) as error:
            said = str(error).replace(repr(path), "it").splitlines() or [type(error).__name__]
            raise UnreadableImage(
                f"{path} is damaged or no image ({said[0]}); mend or delete it"
            ) from None
        if any(self.shape) and pixels.shape != self.shape:
            raise UnreadableImage(
                f"{path} has {_said(pixels.shape)} and {self._first} {_said(self.shape)}; give size=PIXELS, to which all "
                "images are brought"
            )
        return pixels

    def _pixels(self, image: "Image", path: str) -> Tensor:
        if (own := MODES.get(image.mode)) is None:
            raise UnreadableImage(
                f"{path} has pixels of Pillow's mode {image.mode}, and one byte a channel is read; convert it to grey or RGB"
            )
        channels = self._channels or self.shape[0] or own
        if self._channels is None and own != channels:
            kind = {1: "grey", 3: "coloured"}
            raise UnreadableImage(
                f"{path} is {kind[own]} and {self._first} is {kind[channels]}; give channels=3 or channels=1, to which all "
                "images are converted"
            )
        opaque = (
            image.convert("RGBA") if image.mode == "P" else image
        )  # Pillow warns of a palette with transparency otherwise
        image = opaque.convert("L" if channels == 1 else "RGB")
        if self._size is not None:
            import torchvision.transforms.functional as TF

            image = TF.center_crop(TF.resize(image, [self._size]), [self._size, self._size])
        return from_pillow(image)


class ImageFiles(NamedTuple):
    """Images that do not lie in memory, as `bilevel.problems.datasets.labelled_images.Images` are those that do."""

    train: Files
    valid: Files
    test: Files | None
    mean: Level
    std: Level
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.train.shape

    @property
    def brightest(self) -> float:
        """The brightest pixel that there can be."""
        return 255.0

    @property
    def class_count(self) -> int:
        """How many classes there are."""
        return self.classes


def from_pillow(image: "Image") -> UInt8[Tensor, "channels height width"]:
    """The pixels of an image of one byte a channel."""
    (width, height), flat = (
        image.size,
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8),
    )
    return flat.view(height, width, -1).permute(2, 0, 1).contiguous()


def _said(shape: Any) -> str:
    channels, height, width = shape
    return f"{height} × {width} pixels of {channels} channel{'s' * (channels > 1)}"
