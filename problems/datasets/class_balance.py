"""Subsets of labelled data whose classes are balanced, or follow a long tail."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.validate import at_least, wrong


def long_tailed(
    split: tuple[Tensor, Tensor], ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a subset whose class sizes fall geometrically.

    Class c of C keeps n · ratio^(−c/(C − 1)) images, where n is the size of the smallest class.

    Args:
        split: images and labels.
        ratio: size of the largest class divided by the size of the smallest one.
        generator: source of the draws.

    Source: Cui et al., CVPR 2019, section 5.

    Raises:
        BilevelError: the ratio is below 1, or leaves a class without images.
    """
    at_least(1, ratio=ratio)
    counts = split[1].bincount()
    part = ratio ** (-torch.arange(len(counts)).double() / max(1, len(counts) - 1))
    kept = (int(counts.min()) * part).round().long()
    if int(kept.min()) < 1:
        most = int(counts.min())
        raise wrong("ratio", ratio, "leaves the rarest class empty", f"choose at most {most}")
    return draw_per_class(split, kept.tolist(), generator)


def balanced(split: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a subset in which every class has the size of the smallest class."""
    counts = split[1].bincount()
    return draw_per_class(split, [int(counts.min())] * len(counts), generator)


def draw_per_class(
    split: tuple[Tensor, Tensor], counts: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return `counts[c]` random images of each class c, in the order of the split."""
    x, labels = split
    order = torch.randperm(len(labels), generator=generator)
    kept = torch.cat([order[labels[order] == c][:count] for c, count in enumerate(counts)])
    kept = kept.sort().values
    return x[kept], labels[kept]
