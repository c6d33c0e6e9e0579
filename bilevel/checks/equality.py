"""Comparison of results: bit for bit, or up to rounding."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def bitwise_equal(one: Any, other: Any) -> bool:
    """Return whether two pytrees hold the same bits."""
    ours, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(_equal(a, b) for a, b in pairs)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two leaves agree; NaN, which marks missing values, agrees with NaN."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other or bool(torch.as_tensor(one == other).all())
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two results of one computation in different orders agree up to rounding."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = max(1e-4, 16 * torch.finfo(one.dtype).eps)
    size = float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    return torch.allclose(
        one, other, rtol=tolerance, atol=1e-6 + tolerance * 1e-2 * size, equal_nan=True
    )
