"""Data for linear regression: synthetic with a given condition number, or from scikit-learn."""

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel.problems.dtypes import DType, floating
from bilevel.validate import at_least, between, whole

Split: TypeAlias = tuple[Tensor, Tensor]
"""X [n, d] and y [n] of one data split."""


class LinearData(NamedTuple):
    """Three data splits."""

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
    """Draw y = Xw + `noise` · N(0, 1), with `examples` rows in each split.

    On the training split, the eigenvalues of XᵀX/n are exactly log-evenly spaced from 1 down to
    1/`condition`. The first `active` entries of w are N(0, 1), and the others are zero; by default
    all are active.

    Example:
        >>> X, y = synthetic(examples=20, features=4, condition=100.0, dtype="float64").train
        >>> round(torch.linalg.cond(X.T @ X / 20).item(), 6)
        100.0

    Raises:
        BilevelError: there are no features, fewer examples than features, or more active features
            than features; the condition is below 1, or the noise is below 0.
    """
    whole(1, features=features)
    whole(features, f"choose at least {features}, the number of features", examples=examples)
    at_least(1, condition=condition)
    at_least(0, noise=noise)
    if active is not None:
        between(0, features, f"choose at most {features}", active=active)
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
    """Load scikit-learn's diabetes data: predict the progress of a disease from 10 measurements.

    There are 442 patients. Like the other real sets, the data are shuffled by `data_seed`, split
    60/20/20 and standardized by the training split.
    """
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return _real(X, y, data_seed, dtype)


def linnerud(data_seed: int = 0, *, dtype: DType = None) -> LinearData:
    """Load scikit-learn's Linnerud data: predict the waist from chin-ups, sit-ups and jumps.

    There are 20 men.

    Source: Tenenhaus, La régression PLS, 1998.
    """
    from sklearn.datasets import load_linnerud

    X, targets = load_linnerud(return_X_y=True)
    return _real(X, targets[:, 1], data_seed, dtype)


def wine(data_seed: int = 1, *, dtype: DType = None) -> LinearData:
    """Load scikit-learn's wine data: predict the alcohol from the 12 other measurements.

    There are 178 wines. The set is made for classification by cultivar, which is not used here.

    Source: Aeberhard & Forina, UCI Machine Learning Repository, 1991.
    """
    from sklearn.datasets import load_wine

    measured, _ = load_wine(return_X_y=True)
    return _real(measured[:, 1:], measured[:, 0], data_seed, dtype)


def _real(X: Any, y: Any, data_seed: int, dtype: DType) -> LinearData:
    """Shuffle arrays, split them 60/20/20, and standardize them by the training split."""
    X, y = (torch.from_numpy(a).double() for a in (X, y))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(data_seed))
    rows = order.tensor_split([int(0.6 * len(X)), int(0.8 * len(X))])
    X, y = ((a - a[rows[0]].mean(0)) / a[rows[0]].std(0) for a in (X, y))
    return LinearData(*(_cast(X[i], y[i], dtype) for i in rows))


def _cast(X: Tensor, y: Tensor, dtype: DType) -> Split:
    return X.to(floating(dtype)), y.to(floating(dtype))
