"""Label noise: replace a part of the labels by wrong ones."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bilevel import (
    BilevelError,
)
from bilevel.text import near

Noise: TypeAlias = Literal["uniform", "pairwise"]


def corrupt(
    labels: Int[Tensor, " n"], rate: float, noise: Noise, generator: torch.Generator
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The labels with exactly round(rate · n) of them wrong, and which.

    Example:
        >>> given, wrong = corrupt(torch.tensor([0, 1, 2, 2]), 0.5, "pairwise", torch.Generator().manual_seed(0))
        >>> given.tolist(), wrong.tolist()
        ([1, 2, 2, 2], [True, True, False, False])

    Raises:
        BilevelError: a rate outside [0, 1), an unknown noise, or labels of one class alone.
    """
    if not 0 <= rate < 1:
        raise BilevelError(
            f"rate={rate} is no part of the labels that can be wrong; give one from 0 up to, but not, 1"
        )
    if noise not in (known := ("uniform", "pairwise")):
        raise BilevelError(
            f"noise={noise!r}{near(str(noise), known)} is neither uniform nor pairwise; choose one of the two"
        )
    if (classes := int(labels.max()) + 1) < 2:
        raise BilevelError(
            "the labels are of one class, so that none can be wrong; give data of two classes at least"
        )
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]] = True
    shift = (
        torch.randint(1, classes, labels.shape, generator=generator)
        if noise == "uniform"
        else torch.ones_like(labels)
    )
    return torch.where(wrong, (labels + shift) % classes, labels), wrong
