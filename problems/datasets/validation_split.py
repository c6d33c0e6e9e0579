"""Validation split: set a fraction of the examples aside."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import BilevelError
from bilevel.validate import is_number, one_of, wrong

SplitMethod: TypeAlias = Literal["tail", "random", "stratified"]


def split_indices(
    labels: Int[Tensor, " n"],
    fraction: float,
    split: SplitMethod = "tail",
    seed: int = 0,
    name: str = "valid_fraction",
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " aside"]]:
    """Return the indices of the examples that stay, and of round(fraction · n) that are set aside.

    - `tail` sets the last examples aside and keeps the order, as in the paper.
    - `random` sets random examples aside.
    - `stratified` sets the same fraction of every class aside, to within one example, and never
      the last example of a class.

    The order of `random` and `stratified` parts is random, so the first examples of a part are a
    sample of it.

    Args:
        labels: class of every example.
        fraction: fraction of all examples, in (0, 1).
        split: one of the methods above.
        seed: seed of `random` and `stratified`.
        name: name of the fraction in errors.

    Example:
        >>> [part.tolist() for part in split_indices(torch.tensor([0, 1, 0, 1, 0]), 0.4)]
        [[0, 1, 2], [3, 4]]
        >>> kept, aside = split_indices(torch.arange(3).repeat_interleave(10), 0.2, "stratified")
        >>> sorted((aside // 10).tolist())
        [0, 0, 1, 1, 2, 2]

    Raises:
        BilevelError: the method is unknown, a part has no examples, a class loses all its
            training examples, or the tail has one class.
    """
    one_of(("tail", "random", "stratified"), split=split)
    n = len(labels)
    count = require_fraction(fraction, name, n)
    order = (
        torch.arange(n)
        if split == "tail"
        else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    )
    if split == "stratified":
        chosen = _stratified(labels[order], count)
        kept, aside = order[~chosen], order[chosen]
    else:
        kept, aside = order[: n - count], order[n - count :]
    all_classes, kept_classes, aside_classes = (
        set(labels[index].tolist()) for index in (order, kept, aside)
    )
    if lost := sorted(all_classes - kept_classes):
        remedy = (
            "set split=stratified"
            if split != "stratified"
            else "add images to that class, or lower the fraction"
        )
        raise wrong(
            name,
            fraction,
            f"leaves no training image of class {lost[0]} with split={split}",
            remedy,
        )
    if split == "tail" and count > 1 and len(aside_classes) == 1 < len(all_classes):
        raise BilevelError(
            f"split=tail sets {count} images aside that are all of class {labels[-1]}, as in data "
            "sorted by class; set split=stratified"
        )
    return kept, aside


def require_fraction(fraction: float, name: str, count: int | None = None) -> int:
    """Return round(fraction · count), after a check that both parts have examples.

    Raises:
        BilevelError: one part is empty.
    """
    if not (is_number(fraction) and 0 < fraction < 1):
        raise wrong(name, fraction, "must be between 0 and 1", "choose for example 0.2")
    aside = 0 if count is None else round(fraction * count)
    if count is not None and aside in (0, count):
        raise wrong(
            name,
            fraction,
            f"leaves one part of {count} images empty",
            "choose a number nearer to 0.5",
        )
    return aside


def _stratified(labels: Tensor, count: int) -> Tensor:
    """Return a mask of `count` examples, the first ones of each class in proportion to its size.

    Largest remainders fill the count up.
    """
    sizes = labels.bincount()
    wanted = sizes * (count / len(labels))
    shares = wanted.floor().long()
    remainders = torch.where(shares + 1 < sizes, wanted - shares, -1.0)
    shares[remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    together = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    rank[together] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[together]]
    return rank < shares[labels]
