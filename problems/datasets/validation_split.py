"""Validation examples set aside: the last ones, any, or of every class its share."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import BilevelError
from bilevel.text import near

Split: TypeAlias = Literal["tail", "random", "stratified"]

SPLITS = ("tail", "random", "stratified")


def split(
    labels: Int[Tensor, " n"],
    fraction: float,
    how: Split = "tail",
    seed: int = 0,
    name: str = "valid_fraction",
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " aside"]]:
    """Indices of those that are kept, and of round(fraction · n) that are set aside.

    `tail` sets the last ones aside and keeps the order (the paper's); `random` any; `stratified` of every class its share, to
    within one example, never its last one. The order of the latter two is random too, so that the first of either part are a
    sample of it.

    Args:
        labels: class of every example.
        fraction: of all examples.
        how: see above.
        seed: of `random` and `stratified`.
        name: what errors call the fraction.

    Example:
        >>> [part.tolist() for part in split(torch.tensor([0, 1, 0, 1, 0]), 0.4)]
        [[0, 1, 2], [3, 4]]
        >>> kept, aside = split(torch.arange(3).repeat_interleave(10), 0.2, "stratified")
        >>> sorted((aside // 10).tolist())
        [0, 0, 1, 1, 2, 2]

    Raises:
        BilevelError: an unknown `how`, a part without examples, a class that is left without any, or a tail of one class.
    """
    if how not in SPLITS:
        raise BilevelError(
            f"split={how!r}{near(str(how), SPLITS)} is none of {', '.join(SPLITS)}; choose one of these"
        )
    if not 0 < fraction < 1:
        raise BilevelError(
            f"{name}={fraction} leaves a split without images; give one between 0 and 1"
        )
    n = len(labels)
    count = round(fraction * n)
    if count in (0, n):
        raise BilevelError(
            f"{name}={fraction} of {n} images leaves a split empty; give one further inside"
        )
    order = (
        torch.arange(n)
        if how == "tail"
        else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    )
    if how == "stratified":
        chosen = _shares(labels[order], count)
        kept, aside = order[~chosen], order[chosen]
    else:
        kept, aside = order[: n - count], order[n - count :]
    there, left, taken = (set(labels[index].tolist()) for index in (order, kept, aside))
    if lost := sorted(there - left):
        raise BilevelError(
            f"{name}={fraction} with split={how} leaves no training image of class {lost[0]}; "
            + (
                "give split=stratified"
                if how != "stratified"
                else "give that class more images, or lower the fraction"
            )
        )
    if how == "tail" and count > 1 and len(taken) == 1 < len(there):
        raise BilevelError(
            f"the last {count} images are all of class {labels[-1]}, as in a folder sorted by class; give split=stratified"
        )
    return kept, aside


def _shares(labels: Tensor, count: int) -> Tensor:
    """Which of the examples, in this order, are the first of their class's share of `count`; largest remainders fill it up."""
    sizes = labels.bincount()
    wanted = sizes * (count / len(labels))
    shares = wanted.floor().long()
    remainders = torch.where(shares + 1 < sizes, wanted - shares, -1.0)
    shares[remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    together = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    rank[together] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[together]]
    return rank < shares[labels]
