"""What an image has once, or once for each channel: mean, standard deviation, a colour."""

from typing import TypeAlias, final

import torch
from torch import Tensor

Level: TypeAlias = float | tuple[float, ...]
"""One number for all channels, or one for each."""


@final
class PerChannel:
    """A `Level` as it broadcasts against images [B, C, H, W]; the tensor of each device is made once, so that no step waits.

    Example:
        >>> PerChannel((1.0, 2.0)).like(torch.zeros(5, 2, 3, 3)).shape, PerChannel(0.5).like(torch.zeros(5, 2, 3, 3))
        (torch.Size([2, 1, 1]), 0.5)
    """

    def __init__(self, value: Level) -> None:
        self.value = value
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> float | Tensor:
        """The number, or [C, 1, 1] on the device of x, of its type where that is a floating-point one."""
        if not isinstance(self.value, tuple):
            return self.value
        place = (x.device, x.dtype if x.is_floating_point() else torch.get_default_dtype())
        if place not in self._made:
            self._made[place] = torch.tensor(self.value, device=place[0], dtype=place[1]).view(
                -1, 1, 1
            )
        return self._made[place]


@final
class Standardize:
    """(x − mean) / std of images [B, C, H, W].

    Example:
        >>> seen = Standardize((1.0, 2.0), 2.0)
        >>> seen(torch.full((1, 2, 1, 1), 3, dtype=torch.uint8)).flatten()
        tensor([1.0000, 0.5000])
    """

    def __init__(self, mean: Level, std: Level) -> None:
        self._mean, self._std = PerChannel(mean), PerChannel(std)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self._mean.like(x)) / self._std.like(x)

    def inverse(self, x: Tensor) -> Tensor:
        """The images of which these are the standardized ones."""
        return x * self._std.like(x) + self._mean.like(x)
