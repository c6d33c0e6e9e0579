"""Networks, plain modules with named places where a problem may put dropout."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.text import near

Norm: TypeAlias = Literal["none", "batch", "group"]

Drop: TypeAlias = Callable[[int, Tensor], Tensor]
"""What happens to the activations x [B, …] at dropout site i: drop(i, x)."""


def keep(site: int, x: Tensor) -> Tensor:
    """No dropout at any site."""
    return x


def check_widths(**widths: Sequence[Any]) -> None:
    """Raise where a layer would have no unit: PyTorch makes such layers, and nothing comes through.

    Raises:
        BilevelError: a width that is no whole number, or below 1.
    """
    for name, given in widths.items():
        if not all(type(width) is int and width >= 1 for width in given):
            raise BilevelError(
                f"{name}={list(given)} makes no network; give whole numbers, 1 or more"
            )


def drop_channels(
    drop: Drop, site: int, x: Float[Tensor, "batch channels *shape"]
) -> Float[Tensor, "batch channels *shape"]:
    """Dropout of whole channels: what `drop` makes of ones, [B, C, 1, …], times x."""
    return x if drop is keep else x * drop(site, x.new_ones(*x.shape[:2], *[1] * (x.ndim - 2)))


def normalization(norm: Norm, channels: int) -> nn.Module:
    """The norm layer called `norm` of so many channels; nothing for `none`.

    Group norm has 32 groups, as in the paper, and fewer where there would be less than two channels to a group, or a remainder.

    Source: Wu & He, ECCV 2018, section 4.1.

    Example:
        >>> normalization("group", 64).num_groups, normalization("group", 24).num_groups
        (32, 12)

    Raises:
        BilevelError: there is no such norm.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        most = max(1, min(32, channels // 2))
        return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels)
    check_norm(norm)
    return nn.Identity()


def check_norm(norm: str) -> None:
    """Raise where there is no such norm.

    Raises:
        BilevelError: naming those that there are.
    """
    if norm not in (known := get_args(Norm)):
        raise BilevelError(
            f"norm={norm!r}{near(str(norm), known)} is none of {', '.join(known)}; choose one of these"
        )


class MLP(nn.Module):
    """A fully connected ReLU network on flattened inputs, with the layer sizes n₀, n₁, …, n_L.

    Dropout site 0 is the input, site i the output of hidden layer i: there are L of them, one before each layer of weights.

    Example:
        >>> import torch
        >>> MLP([64, 32, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        check_widths(hidden=sizes[1:-1])
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)
        )

    def forward(
        self, x: Float[Tensor, "batch *shape"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = rearrange(x, "batch ... -> batch (...)")
        for site, layer in enumerate(self.layers):
            x = layer(drop(site, F.relu(x) if site else x))
        return x


class SimpleCNN(nn.Module):
    """Two 5×5 convolutions, each with ReLU and 2×2 pooling, and two linear layers, for images of `shape`.

    Dropout sites: 0 the input, 1 and 2 the convolutions (whole channels), 3 the hidden layer.

    Args:
        first: channels of the first convolution.
        second: channels of the second.
        hidden: units of the hidden layer; by default as many as it has inputs, 1568 for 28 × 28 pixels.
        shape: channels, height and width of an image.
        classes: how many logits there are.
        norm: after each convolution: `none`, `batch` or `group`.

    Source: Bae & Grosse, NeurIPS 2020, the FashionMNIST experiment of the official code.

    Raises:
        BilevelError: an image below 4 × 4 pixels, a width that makes no layer, or an unknown norm.

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
                f"SimpleCNN halves an image twice, and nothing is left of {height} × {width} pixels; give 4 × 4 at least"
            )
        bias = norm == "none"  # a norm takes the mean off again, and shifts by itself
        self.convolutions = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 5, padding=2, bias=bias)
            for fan_in, fan_out in ((channels, first), (first, second))
        )
        self.norms = nn.ModuleList(normalization(norm, n) for n in (first, second))
        units = inputs if hidden is None else hidden
        self.hidden, self.out = nn.Linear(inputs, units), nn.Linear(units, classes)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = drop(0, x)
        for site, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True), start=1
        ):
            x = drop_channels(drop, site, F.max_pool2d(F.relu(norm(convolution(x))), 2))
        return self.out(drop(3, F.relu(self.hidden(x.flatten(1)))))
