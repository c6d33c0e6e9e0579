"""Labelled images, split into train, valid and test."""

from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Files, ImageFiles, Labelled
from bilevel.problems.datasets.standardize import Level


class Images(NamedTuple):
    """Images as stored, one byte a pixel, with their labels; a network sees (image − mean) / std.

    `mean` and `std` are one number, or one for each channel. `white` is the brightest pixel that there can be, by default the
    brightest that there is; `classes` how many there are, by default as many as the labels name.
    """

    train: Labelled
    valid: Labelled
    test: Labelled | None
    mean: Level
    std: Level
    white: float | None = None
    classes: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train[0].shape[1:])  # type: ignore[return-value]  # rows of numbers, which an MLP takes, have one

    @property
    def brightest(self) -> float:
        """`white`, or what stands in for it."""
        return float(self.train[0].max()) if self.white is None else self.white

    @property
    def class_count(self) -> int:
        """`classes`, or what stands in for it."""
        splits = [split for split in (self.train, self.valid, self.test) if split is not None]
        return self.classes or 1 + max(int(labels.max()) for _, labels in splits)


def moments(
    pixels: UInt8[Tensor, "n channels height width"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exactly.

    Example:
        >>> moments(torch.tensor([0, 2], dtype=torch.uint8).view(2, 1, 1, 1))
        ((1.0,), (1.0,))
    """
    values = torch.arange(256, dtype=torch.float64)
    shares = torch.stack(
        [channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)]
    ).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp_min(1e-6).tolist())


AnyImages = TypeVar("AnyImages", bound=Images | ImageFiles)


def few(
    images: AnyImages, train_size: int | None = None, valid_size: int | None = None
) -> AnyImages:
    """The same images with the first `train_size` of train and the first `valid_size` of valid alone; None keeps all.

    Example:
        >>> from bilevel.problems.datasets.standard_images import load_digits
        >>> few(load_digits(), train_size=100).train[1].shape
        torch.Size([100])

    Raises:
        BilevelError: a size beyond what there is.
    """

    def first(name: str, part: Any, size: int | None) -> Any:
        there = len(part if isinstance(part, Files) else part[1])
        if size is None:
            return part
        if not 1 <= size <= there:
            raise BilevelError(
                f"{name}_size={size} of {there} images cannot be taken; give 1 to {there}"
            )
        return (
            part.taken(range(size)) if isinstance(part, Files) else (part[0][:size], part[1][:size])
        )

    train, valid = (
        first("train", images.train, train_size),
        first("valid", images.valid, valid_size),
    )
    return images._replace(train=train, valid=valid)  # type: ignore[return-value]  # of the same class
