"""Tables with a class per row, standardized and split into train, valid and test."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilevel.validate import one_of

Rows = tuple[Float[Tensor, "n features"], Int[Tensor, " n"]]


class Table(NamedTuple):
    """Features with mean 0 and variance 1 on the training split, and their classes, from 0."""

    train: Rows
    valid: Rows
    test: Rows
    classes: int


def interactions(examples: int = 1500, features: int = 8, seed: int = 0) -> Rows:
    """Draw x ~ N(0, I) with the class [x₁x₂ + x₃x₄ > 0].

    No linear function of x predicts the class, and half of the features are irrelevant.

    Example:
        >>> x, y = interactions()
        >>> x.shape, bool((y == (x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] > 0)).all())
        (torch.Size([1500, 8]), True)
    """
    x = torch.randn(examples, features, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] > 0).long()


def _packaged(name: str) -> Callable[[], Rows]:
    def load() -> Rows:
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, f"load_{name}")()
        return torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).long()

    return load


TABLES: dict[str, Callable[[], Rows]] = {
    "interactions": interactions,
    **{name: _packaged(name) for name in ("breast_cancer", "digits", "wine")},
}


def load_table(name: str, split_seed: int = 0) -> Table:
    """Load a table by name, shuffled and split 60/20/20.

    Args:
        name: `interactions`, or scikit-learn's `breast_cancer`, `digits` or `wine`.
        split_seed: seed of the shuffle.

    Example:
        >>> load_table("interactions").train[0].shape
        torch.Size([900, 8])

    Raises:
        BilevelError: the name is unknown.
    """
    one_of(TABLES, data=name)
    x, y = TABLES[name]()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    parts = order.tensor_split([int(0.6 * len(y)), int(0.8 * len(y))])
    mean, std = x[parts[0]].mean(0), x[parts[0]].std(0)
    x = (x - mean) / torch.where(std > 0, std, 1)
    train, valid, test = ((x[part], y[part]) for part in parts)
    return Table(train, valid, test, classes=int(y.max()) + 1)
