"""Subsets with a long tail of classes, or with balanced classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel import (
    BilevelError,
)


def long_tailed(
    split: tuple[Tensor, Tensor], ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As many images of class 0 as of the rarest class before, and of class c a part ratio^(−c/(C − 1)) of that.

    Source: Cui et al., CVPR 2019, section 5.

    Raises:
        BilevelError: a ratio below 1, or one that leaves a class without images.
    """
    counts = split[1].bincount()
    if not ratio >= 1:
        raise BilevelError(
            f"ratio={ratio} is below 1, where classes are equal; give how many times rarer the rarest shall be"
        )
    part = ratio ** (-torch.arange(len(counts)).double() / max(1, len(counts) - 1))
    kept = (int(counts.min()) * part).round().long()
    if int(kept.min()) < 1:
        raise BilevelError(
            f"ratio={ratio} leaves no image of the rarest class; give one of at most {int(counts.min())}"
        )
    return drawn(split, kept.tolist(), generator)


def balanced(split: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many images of every class as there are of the rarest."""
    counts = split[1].bincount()
    return drawn(split, [int(counts.min())] * len(counts), generator)


def drawn(
    split: tuple[Tensor, Tensor], counts: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """So many images of each class, in the order of the split."""
    x, labels = split
    order = torch.randperm(len(labels), generator=generator)
    kept = (
        torch.cat([order[labels[order] == c][:count] for c, count in enumerate(counts)])
        .sort()
        .values
    )
    return x[kept], labels[kept]
