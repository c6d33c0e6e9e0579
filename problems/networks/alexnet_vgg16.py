"""AlexNet and VGG16 for small images, with a dropout site after each layer but the last."""

from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.problems.networks.building_blocks import (
    Drop,
    Norm,
    check_widths,
    drop_channels,
    he_,
    keep,
    normalization,
    scaled,
)


class Convolutional(nn.Module):
    """3×3 convolutions with ReLU, some with 2×2 maximum pooling, then linear layers with ReLU.

    Dropout sites: 0 the input, then each convolution (whole channels, after its pooling), then each
    linear layer but the last.

    Args:
        shape: channels, height and width of an image.
        classes: number of logits.
        channels: number of channels of each convolution.
        pooled: convolutions that a pooling follows, counted from 1.
        hidden: number of units of each hidden linear layer.
        stride: stride of the first convolution.
        norm: layer after each convolution: `none`, `batch` or `group`.

    Raises:
        BilevelError: the image is too small for the poolings, or a layer has no unit.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        channels: Iterable[int],
        pooled: Iterable[int],
        hidden: Iterable[int],
        *,
        stride: int = 1,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        channels, hidden = list(channels), list(hidden)
        self.pooled = frozenset(pooled)
        check_widths(channels=channels, hidden=hidden)
        height, width = (remaining(side, stride, len(self.pooled)) for side in shape[1:])
        if not height * width:
            least = stride * 2 ** len(self.pooled)
            raise BilevelError(
                f"{type(self).__name__} halves an image of {shape[1]} × {shape[2]} pixels "
                f"{len(self.pooled) + (stride > 1)} times, and nothing is left; give images of at "
                f"least {least} × {least} pixels (pad them), or choose another network"
            )
        bias = norm == "none"  # a norm subtracts the mean, and adds its own shift
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, stride=1 if i else stride, padding=1, bias=bias)
            for i, (fan_in, fan_out) in enumerate(
                zip([shape[0], *channels], channels, strict=False)
            )
        )
        self.norms = nn.ModuleList(normalization(norm, n) for n in channels)
        inputs = [channels[-1] * height * width, *hidden]
        self.linear = nn.ModuleList(
            nn.Linear(fan_in, fan_out)
            for fan_in, fan_out in zip(inputs, [*hidden, classes], strict=True)
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = drop(0, x)
        for site, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True), start=1
        ):
            x = F.relu(norm(convolution(x)))
            x = drop_channels(drop, site, F.max_pool2d(x, 2) if site in self.pooled else x)
        x = x.flatten(1)
        for site, layer in enumerate(self.linear, start=len(self.convolutions)):
            x = layer(x if site == len(self.convolutions) else drop(site, F.relu(x)))
        return x


def remaining(side: int, stride: int, poolings: int) -> int:
    """Return the pixels of a side after a convolution with `stride` and padding 1, and poolings."""
    return ((side - 1) // stride + 1) >> poolings


class AlexNet(Convolutional):
    """AlexNet for 32 × 32 pixels, with 23.27 million weights and 8 dropout sites.

    It has 5 convolutions and 2 hidden linear layers.

    Args:
        shape: channels, height and width of an image, at least 16 × 16 pixels.
        classes: number of logits.
        norm: layer after each convolution: `none`, `batch` or `group`.
        width: factor on all numbers of channels and units.

    Source: Krizhevsky et al., NeurIPS 2012; in this form Bae & Grosse, NeurIPS 2020, the CIFAR-10
    experiment of the official code.

    Example:
        >>> import torch
        >>> AlexNet(width=1 / 16)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    SITES = 8

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        norm: Norm = "none",
        width: float = 1,
    ) -> None:
        channels, hidden = scaled([64, 192, 384, 256, 256], width), scaled([4096, 4096], width)
        super().__init__(shape, classes, channels, [1, 2, 5], hidden, stride=2, norm=norm)


class VGG16(Convolutional):
    """VGG16 for 32 × 32 pixels, with 15.25 million weights and 16 dropout sites.

    It has 13 convolutions and 2 hidden linear layers. `he_` gives the initial values of the
    convolutions: with those of PyTorch, activations fade, and a network without a norm does not
    train.

    Args:
        shape: channels, height and width of an image, at least 32 × 32 pixels.
        classes: number of logits.
        norm: layer after each convolution: `none`, `batch` or `group`.
        width: factor on all numbers of channels and units.

    Source: Simonyan & Zisserman, ICLR 2015, configuration D; in this form Bae & Grosse, NeurIPS
    2020, the CIFAR-10 experiment of the official code.

    Example:
        >>> import torch
        >>> VGG16(width=1 / 16)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    SITES = 16

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        norm: Norm = "none",
        width: float = 1,
    ) -> None:
        channels = scaled([64, 64, 128, 128, *[256] * 3, *[512] * 6], width)
        super().__init__(
            shape, classes, channels, [2, 4, 7, 10, 13], scaled([512, 512], width), norm=norm
        )
        self.convolutions.apply(he_)
