"""Label noise: replace a fraction of the labels by wrong ones."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bilevel import BilevelError
from bilevel.validate import is_number, one_of, wrong

Noise: TypeAlias = Literal["uniform", "pairwise"]


def corrupt(
    labels: Int[Tensor, " n"], rate: float, noise: Noise, generator: torch.Generator
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return labels of which exactly round(rate · n) are wrong, and a mask of the wrong ones.

    Args:
        labels: right classes.
        rate: fraction of wrong labels, in [0, 1).
        noise: `uniform` draws any other class; `pairwise` takes class c + 1, and class 0 after the
            last one.
        generator: source of the draws.

    Example:
        >>> draws = torch.Generator().manual_seed(0)
        >>> labels, mask = corrupt(torch.tensor([0, 1, 2, 2]), 0.5, "pairwise", draws)
        >>> labels.tolist(), mask.tolist()
        ([1, 2, 2, 2], [True, True, False, False])

    Raises:
        BilevelError: the rate is outside [0, 1), the noise is unknown, or all labels are of one
            class.
    """
    if not (is_number(rate) and 0 <= rate < 1):
        raise wrong("rate", rate, "must be at least 0 and below 1", "choose for example 0.5")
    one_of(("uniform", "pairwise"), noise=noise)
    if (classes := int(labels.max()) + 1) < 2:
        raise BilevelError(
            "label noise needs two classes, and all labels are of one class; "
            "give data of at least two classes"
        )
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]] = True
    shift = (
        torch.randint(1, classes, labels.shape, generator=generator)
        if noise == "uniform"
        else torch.ones_like(labels)
    )
    return torch.where(mask, (labels + shift) % classes, labels), mask
