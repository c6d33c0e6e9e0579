"""Labelled images in memory, with their train, valid and test splits."""

from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from bilevel.problems.datasets.image_files import ImageFileDataset, ImageFiles, Labelled
from bilevel.problems.datasets.standardize import Level
from bilevel.validate import between


class Images(NamedTuple):
    """Images as stored, one byte per pixel, and their labels; a network sees (image − mean) / std.

    Attributes:
        train: images and labels of the training split.
        valid: images and labels of the validation split.
        test: images and labels of the test split, or None.
        mean: one number, or one number per channel.
        std: one number, or one number per channel.
        white: brightest value that a pixel can have; by default the brightest one that occurs.
        classes: number of classes; by default the number of classes that the labels name.
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
        """Return channels, height and width of an image."""
        # Rows of numbers, which an MLP accepts too, have one axis.
        return tuple(self.train[0].shape[1:])  # type: ignore[return-value]

    @property
    def brightest(self) -> float:
        """Return `white`, or the brightest value that occurs."""
        return float(self.train[0].max()) if self.white is None else self.white

    @property
    def class_count(self) -> int:
        """Return `classes`, or the number of classes that the labels name."""
        splits = [split for split in (self.train, self.valid, self.test) if split is not None]
        return self.classes or 1 + max(int(labels.max()) for _, labels in splits)


def channel_moments(
    pixels: UInt8[Tensor, "n channels height width"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation of each channel.

    Example:
        >>> channel_moments(torch.tensor([0, 2], dtype=torch.uint8).view(2, 1, 1, 1))
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


def first_examples(
    images: AnyImages, train_size: int | None = None, valid_size: int | None = None
) -> AnyImages:
    """Return the same images with the first examples of training and validation only.

    Args:
        images: in memory or in files.
        train_size: number of training images; None keeps all.
        valid_size: number of validation images; None keeps all.

    Example:
        >>> from bilevel.problems.datasets import load_digits
        >>> first_examples(load_digits(), train_size=100).train[1].shape
        torch.Size([100])

    Raises:
        BilevelError: a size exceeds the number of images.
    """

    def first(name: str, part: Any, size: int | None) -> Any:
        if size is None:
            return part
        count = len(part if isinstance(part, ImageFileDataset) else part[1])
        between(1, count, f"choose at most {count}", **{f"{name}_size": size})
        if isinstance(part, ImageFileDataset):
            return part.subset(range(size))
        return part[0][:size], part[1][:size]

    train = first("train", images.train, train_size)
    valid = first("valid", images.valid, valid_size)
    # Both kinds of images have these fields.
    return images._replace(train=train, valid=valid)  # type: ignore[return-value]
