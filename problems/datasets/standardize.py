"""Standardization of images by a mean and a standard deviation, for all channels or per channel."""

from typing import TypeAlias, final

import torch
from torch import Tensor

Level: TypeAlias = float | tuple[float, ...]
"""One number for all channels, or one number per channel."""


@final
class PerChannel:
    """A `Level` that broadcasts against images [B, C, H, W].

    The tensor of each device is made once, so that no step waits for a copy.

    Example:
        >>> PerChannel((1.0, 2.0)).like(torch.zeros(5, 2, 3, 3)).shape
        torch.Size([2, 1, 1])
        >>> PerChannel(0.5).like(torch.zeros(5, 2, 3, 3))
        0.5
    """

    def __init__(self, value: Level) -> None:
        self.value = value
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> float | Tensor:
        """Return one number, or [C, 1, 1] on the device of x.

        The tensor has the type of x if that is a floating-point type, otherwise the default type.
        """
        if not isinstance(self.value, tuple):
            return self.value
        place = (x.device, x.dtype if x.is_floating_point() else torch.get_default_dtype())
        if place not in self._made:
            made = torch.tensor(self.value, device=place[0], dtype=place[1])
            self._made[place] = made.view(-1, 1, 1)
        return self._made[place]


@final
class Standardize:
    """Map images [B, C, H, W] to (x − mean) / std.

    Example:
        >>> standardize = Standardize((1.0, 2.0), 2.0)
        >>> standardize(torch.full((1, 2, 1, 1), 3, dtype=torch.uint8)).flatten()
        tensor([1.0000, 0.5000])
    """

    def __init__(self, mean: Level, std: Level) -> None:
        self._mean = PerChannel(mean)
        self._std = PerChannel(std)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self._mean.like(x)) / self._std.like(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the images whose standardized form is x."""
        return x * self._std.like(x) + self._mean.like(x)
