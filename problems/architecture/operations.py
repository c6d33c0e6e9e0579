"""The operations of a cell, and its other parts, for images and for tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE, SKIP = "none", "skip"


@dataclass(frozen=True)
class Form:
    """What a cell of one kind of data is made of; everything but `head` keeps the width.

    Attributes:
        operations: how each is made for a width, in the order of α; `none` is zero and has no module.
        parameter_free: those without weights, `none` apart.
        stem: from the inputs to the width.
        join: from all nodes of a cell, side by side, to the width.
        between: what lies between two cells.
        pool: from the last cell to [batch, width].
    """

    operations: Mapping[str, Callable[[int], nn.Module]]
    parameter_free: tuple[str, ...]
    stem: Callable[[int, int], nn.Module]
    join: Callable[[int, int], nn.Module]
    between: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]


def _normed(*layers: nn.Module, width: int) -> nn.Module:
    """Layers and a norm without weights: an operation cannot undo its α by its scale, nor can the next by its own.

    Group norm, unlike batch norm, has no state, the same derivatives in training and evaluation, and second ones everywhere.
    """
    return nn.Sequential(*layers, nn.GroupNorm(1, width, affine=False))


def _convolution(width: int, size: int) -> nn.Module:
    return _normed(
        nn.ReLU(), nn.Conv2d(width, width, size, padding=size // 2, bias=False), width=width
    )


def _separable(width: int, dilation: int) -> nn.Module:
    depthwise = nn.Conv2d(
        width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False
    )
    return _normed(nn.ReLU(), depthwise, nn.Conv2d(width, width, 1, bias=False), width=width)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x


IMAGE = Form(
    operations={
        NONE: lambda width: nn.Identity(),
        SKIP: lambda width: nn.Identity(),
        "max_pool": lambda width: _normed(nn.MaxPool2d(3, stride=1, padding=1), width=width),
        "avg_pool": lambda width: _normed(
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), width=width
        ),
        "conv3x3": lambda width: _convolution(width, 3),
        "separable": lambda width: _separable(width, 1),
        "dilated": lambda width: _separable(width, 2),
    },
    parameter_free=(SKIP, "max_pool", "avg_pool"),
    stem=lambda inputs, width: _normed(
        nn.Conv2d(inputs, width, 3, padding=1, bias=False), width=width
    ),
    join=lambda inputs, width: _normed(nn.Conv2d(inputs, width, 1, bias=False), width=width),
    between=_halved,
    pool=lambda x: x.mean((2, 3)),
)
"""Images [B, channels, height, width], halved between cells."""


class Gate(nn.Module):
    """x ↦ (Wx + b) ∘ sigmoid(Vx + c): the product of two linear maps, one of them squashed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


TABLE = Form(
    operations={
        NONE: lambda width: nn.Identity(),
        SKIP: lambda width: nn.Identity(),
        "linear": lambda width: _normed(nn.Linear(width, width), width=width),
        "relu": lambda width: _normed(nn.Linear(width, width), nn.ReLU(), width=width),
        "tanh": lambda width: _normed(nn.Linear(width, width), nn.Tanh(), width=width),
        "gate": lambda width: _normed(Gate(width), width=width),
    },
    parameter_free=(SKIP,),
    stem=lambda inputs, width: _normed(nn.Linear(inputs, width), width=width),
    join=lambda inputs, width: _normed(nn.Linear(inputs, width), width=width),
    between=lambda x: x,
    pool=lambda x: x,
)
"""Rows of features [B, width]."""
