"""The operations of a cell, and its other parts, for images and for tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE, SKIP = "none", "skip"


@dataclass(frozen=True)
class Form:
    """The parts of a cell for one kind of data.

    Attributes:
        operations: functions that make each operation for a width, in the order of α; `none` is
            zero and has no module.
        parameter_free: operations without weights, except `none`.
        stem: makes the module from the inputs to the width.
        join: makes the module from the concatenated nodes of a cell to the width.
        between: the function between two cells.
        pool: the function from the last cell to [batch, width].
    """

    operations: Mapping[str, Callable[[int], nn.Module]]
    parameter_free: tuple[str, ...]
    stem: Callable[[int, int], nn.Module]
    join: Callable[[int, int], nn.Module]
    between: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]


def _normed(*layers: nn.Module, width: int) -> nn.Module:
    """Return layers with a norm without weights, so that no scale can compensate for α.

    Unlike batch norm, group norm has no state, the same derivatives in training and in evaluation,
    and second derivatives everywhere.
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
    """Map x to (Wx + b) ∘ sigmoid(Vx + c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

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
