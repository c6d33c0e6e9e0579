"""Data of linear regression: drawn with a given conditioning, or one of the small sets that scikit-learn ships."""

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel import BilevelError
from bilevel.problems.dtypes import DType, floating

Split: TypeAlias = tuple[Tensor, Tensor]
"""X [n, d] and y [n]."""


class LinearData(NamedTuple):
    """The three splits."""

    train: Split
    valid: Split
    test: Split | None = None


def synthetic(
    examples: int = 60,
    features: int = 10,
    condition: float = 10.0,
    noise: float = 1.0,
    data_seed: int = 0,
    *,
    active: int | None = None,
    dtype: DType = None,
) -> LinearData:
    """Y = Xw + `noise` · N(0, 1), with `examples` rows in each split.

    The eigenvalues of XᵀX/n on the training split are spread evenly in logarithm from 1 down to 1/`condition`, exactly. Of w,
    the first `active` entries are N(0, 1), all by default, and the others zero.

    Example:
        >>> X, y = synthetic(examples=20, features=4, condition=100.0, dtype="float64").train
        >>> round(torch.linalg.cond(X.T @ X / 20).item(), 6)
        100.0

    Raises:
        BilevelError: no features, fewer examples than features, more active features than there are, a condition below 1, or
            noise below 0.
    """
    if features < 1:
        raise BilevelError(
            f"features={features} leaves no w to train; give a whole number, 1 or more"
        )
    if not 1 <= condition < math.inf:
        raise BilevelError(
            f"condition={condition} is no condition number; give a finite number, 1 or more"
        )
    if not 0 <= noise < math.inf:
        raise BilevelError(
            f"noise={noise} is no standard deviation; give a finite number, 0 or more"
        )
    if examples < features:
        raise BilevelError(
            f"{examples} examples span no {features} features; give at least {features} examples"
        )
    if active is not None and not 0 <= active <= features:
        raise BilevelError(
            f"active={active} features are not among {features}; choose a number between 0 and {features}"
        )
    generator = torch.Generator().manual_seed(data_seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rotation = torch.linalg.qr(normal(features, features))[0]
    root = (
        torch.logspace(0, -0.5, features, base=condition, dtype=torch.float64)[:, None] * rotation
    )
    true = normal(features)
    true[features if active is None else active :] = 0
    white = torch.linalg.qr(normal(examples, features))[0] * math.sqrt(examples)
    inputs = [z @ root for z in (white, normal(examples, features), normal(examples, features))]
    return LinearData(*(_cast(X, X @ true + noise * normal(examples), dtype) for X in inputs))


def diabetes(data_seed: int = 1, *, dtype: DType = None) -> LinearData:
    """scikit-learn's diabetes data: 442 patients, the disease's progress from 10 measurements.

    Like the other real sets it is shuffled by `data_seed`, split 60/20/20 and standardized by the training split.
    """
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return _real(X, y, data_seed, dtype)


def linnerud(data_seed: int = 0, *, dtype: DType = None) -> LinearData:
    """scikit-learn's Linnerud data: 20 men, the waist from their chin-ups, sit-ups and jumps.

    Source: Tenenhaus, La régression PLS, 1998.
    """
    from sklearn.datasets import load_linnerud

    X, targets = load_linnerud(return_X_y=True)
    return _real(X, targets[:, 1], data_seed, dtype)


def wine(data_seed: int = 1, *, dtype: DType = None) -> LinearData:
    """scikit-learn's wine data, with a regression made of it: the alcohol of 178 wines from the 12 other measurements.

    The cultivar, which the set is meant to be classified by, is not used.

    Source: Aeberhard & Forina, UCI Machine Learning Repository, 1991.
    """
    from sklearn.datasets import load_wine

    measured, _ = load_wine(return_X_y=True)
    return _real(measured[:, 1:], measured[:, 0], data_seed, dtype)


def _real(X: Any, y: Any, data_seed: int, dtype: DType) -> LinearData:
    """Arrays, shuffled, split 60/20/20 and standardized by the training split."""
    X, y = (torch.from_numpy(a).double() for a in (X, y))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(data_seed))
    rows = order.tensor_split([int(0.6 * len(X)), int(0.8 * len(X))])
    X, y = ((a - a[rows[0]].mean(0)) / a[rows[0]].std(0) for a in (X, y))
    return LinearData(*(_cast(X[i], y[i], dtype) for i in rows))


def _cast(X: Tensor, y: Tensor, dtype: DType) -> Split:
    return X.to(floating(dtype)), y.to(floating(dtype))
