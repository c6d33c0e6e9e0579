"""Labelled image files, read one by one by the workers of a loader, or decoded into memory."""

import copy
import math
import os
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from bilevel import BilevelError, DataWarning
from bilevel.problems.datasets.pillow_images import (
    MODES,
    from_pillow,
    laid_on,
    lossy,
    transparent,
    upright,
)
from bilevel.problems.datasets.standardize import Level
from bilevel.text import first_line
from bilevel.validate import between, whole, wrong

if TYPE_CHECKING:
    from PIL.Image import Image

Labelled: TypeAlias = tuple[UInt8[Tensor, "_n _channels _height _width"], Int[Tensor, " _n"]]
"""Images as stored, one byte per pixel, and their classes."""


class UnreadableImage(BilevelError):
    """An image file cannot be read, or differs from the other files.

    A DataLoader raises the error of a worker again, with the whole traceback as its message. This
    class keeps the sentence only.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@final
class ImageFileDataset(Dataset):
    """Image files and their classes; item i is (pixels [C, H, W] as bytes, class).

    Args:
        paths: at least one file.
        labels: class of each file.
        size: length of the shorter side after resizing, in pixels; a square is cut from the
            middle. None leaves images as they are.
        channels: 1 or 3, to which all images are converted; None takes those of the first image.
        workers: number of processes that read during training, if the images are not in memory.
        background: brightness on which transparent pixels are laid; None takes white and warns.

    Attributes:
        shape: channels, height and width of every image.

    Raises:
        BilevelError: `size`, `channels` or `background` is invalid.
        UnreadableImage: the first file is not an image.

    Warns:
        DataWarning: an image has transparent pixels, several frames or CMYK colors; once for each.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Int[Tensor, " n"],
        *,
        size: int | None = None,
        channels: int | None = None,
        workers: int = 0,
        background: int | None = None,
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.workers = workers
        self._size = size
        self._channels = channels
        self._first = str(paths[0])
        self._background = background
        self._warned: set[str] = set()  # shared by all subsets
        if channels not in (None, 1, 3):
            remedy = "choose 1 (grey), 3 (RGB) or null"
            raise wrong("channels", channels, "is not possible", remedy)
        if size is not None:
            whole(1, "choose a number of pixels, or null", size=size)
        if background is not None:
            between(0, 255, "choose 255 for white or 0 for black", background=background)
        self.shape = (0, 0, 0)  # unknown until the first image is read
        first_channels, height, width = self.read(0).shape
        self.shape = (first_channels, height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "channels height width"], int]:
        return self.read(index), int(self.labels[index])

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all decoded images."""
        return len(self) * math.prod(self.shape)

    def subset(self, index: Sequence[int]) -> "ImageFileDataset":
        """Return the files at these indices, in this order."""
        return self.with_files([self.paths[i] for i in index], self.labels[list(index)])

    def with_files(self, paths: Sequence[str], labels: Int[Tensor, " n"]) -> "ImageFileDataset":
        """Return a data set of other files with the same shape and settings."""
        other = copy.copy(self)
        other.paths = list(paths)
        other.labels = labels
        return other

    def decode(self) -> Labelled:
        """Read all images into memory.

        Raises:
            UnreadableImage: an image is damaged, or has another shape.
        """
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def fill(index: int) -> None:
            pixels[index] = self.read(index)

        # Threads suffice: Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return pixels, self.labels

    def read(self, index: int) -> UInt8[Tensor, "channels height width"]:
        """Read one image.

        Raises:
            UnreadableImage: the image is damaged, has 16 bits per pixel, or has another shape than
                the first one.
        """
        from PIL import Image

        path = self.paths[index]
        damage = (OSError, ValueError, SyntaxError, EOFError, struct.error)
        try:
            with Image.open(path) as image:
                pixels = self._pixels(image, path)
        except UnreadableImage:
            raise
        except (*damage, Image.DecompressionBombError) as error:
            reason = first_line(error).replace(repr(path), "it")
            raise UnreadableImage(
                f"{path} is damaged or not an image ({reason}); repair or delete it"
            ) from None
        if any(self.shape) and pixels.shape != self.shape:
            raise UnreadableImage(
                f"{path} has {_describe(pixels.shape)}, and {self._first} has "
                f"{_describe(self.shape)}; set size=PIXELS to bring all images to one size"
            )
        return pixels

    def _pixels(self, image: "Image", path: str) -> Tensor:
        if (own := MODES.get(image.mode)) is None:
            raise UnreadableImage(
                f"{path} has Pillow's mode {image.mode}, and only modes with one byte per channel "
                "can be read; convert it to grey or RGB"
            )
        channels = self._channels or self.shape[0] or own
        if self._channels is None and own != channels:
            kind = {1: "grey", 3: "colored"}
            raise UnreadableImage(
                f"{path} is {kind[own]}, and {self._first} is {kind[channels]}; "
                "set channels=3 or channels=1 to convert all images"
            )
        for lost, sentence in lossy(image):
            self._warn(lost, f"{path} {sentence}")
        image = upright(image)
        if (layer := transparent(image)) is not None:
            if self._background is None:
                self._warn(
                    "transparent",
                    f"{path} has transparent pixels, which are laid on white; set background=255 "
                    "for white or 0 for black",
                )
            image = laid_on(255 if self._background is None else self._background, layer)
        # Pillow warns about some palettes unless they become RGBA first
        image = image.convert("RGBA") if image.mode == "P" else image
        image = image.convert("L" if channels == 1 else "RGB")
        if self._size is not None:
            import torchvision.transforms.functional as TF

            image = TF.center_crop(TF.resize(image, [self._size]), [self._size, self._size])
        return from_pillow(image)

    def _warn(self, kind: str, sentence: str) -> None:
        """Warn once of a kind of images."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{sentence} (other images too)", DataWarning, stacklevel=2)


class ImageFiles(NamedTuple):
    """Images that stay in files; `Images` holds those that are in memory.

    Attributes:
        train: files of the training split.
        valid: files of the validation split.
        test: files of the test split, or None.
        mean: one number, or one number per channel.
        std: one number, or one number per channel.
        classes: number of classes.
    """

    train: ImageFileDataset
    valid: ImageFileDataset
    test: ImageFileDataset | None
    mean: Level
    std: Level
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of an image."""
        return self.train.shape

    @property
    def brightest(self) -> float:
        """Return the brightest value that a pixel can have."""
        return 255.0

    @property
    def class_count(self) -> int:
        """Return the number of classes."""
        return self.classes


def _describe(shape: Any) -> str:
    channels, height, width = shape
    return f"{height} × {width} pixels of {channels} channel{'s' * (channels > 1)}"
