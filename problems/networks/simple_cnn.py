"""A small convolutional network with dropout sites."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.problems.networks.building_blocks import (
    Drop,
    Norm,
    check_widths,
    drop_channels,
    keep,
    normalization,
)


class SimpleCNN(nn.Module):
    """Two 5×5 convolutions, each with ReLU and 2×2 pooling, and two linear layers.

    Dropout sites: 0 the input, 1 and 2 the convolutions (whole channels), 3 the hidden layer.

    Args:
        first: number of channels of the first convolution.
        second: number of channels of the second convolution.
        hidden: number of hidden units; None takes as many as the layer has inputs, which is 1568
            for 28 × 28 pixels.
        shape: channels, height and width of an image.
        classes: number of logits.
        norm: layer after each convolution: `none`, `batch` or `group`.

    Source: Bae & Grosse, NeurIPS 2020, the FashionMNIST experiment of the official code.

    Raises:
        BilevelError: an image has less than 4 × 4 pixels, a layer has no unit, or the norm is
            unknown.

    Example:
        >>> import torch
        >>> SimpleCNN(shape=(1, 8, 8))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    SITES = 4

    def __init__(
        self,
        first: int = 16,
        second: int = 32,
        hidden: int | None = None,
        shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        check_widths(channels=[first, second], hidden=[] if hidden is None else [hidden])
        channels, height, width = shape
        inputs = second * (height // 4) * (width // 4)
        if not inputs:
            raise BilevelError(
                f"SimpleCNN halves an image of {height} × {width} pixels twice, and nothing is "
                "left; give images of at least 4 × 4 pixels"
            )
        bias = norm == "none"  # a norm subtracts the mean, and adds its own shift
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 5, padding=2, bias=bias)
            for fan_in, fan_out in ((channels, first), (first, second))
        )
        self.norms = nn.ModuleList(normalization(norm, n) for n in (first, second))
        units = inputs if hidden is None else hidden
        self.hidden = nn.Linear(inputs, units)
        self.out = nn.Linear(units, classes)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = drop(0, x)
        layers = zip(self.convolutions, self.norms, strict=True)
        for site, (convolution, norm) in enumerate(layers, start=1):
            x = drop_channels(drop, site, F.max_pool2d(F.relu(norm(convolution(x))), 2))
        return self.out(drop(3, F.relu(self.hidden(x.flatten(1)))))
