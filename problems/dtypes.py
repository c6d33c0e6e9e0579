"""Floating-point types by name, as a configuration gives them."""

from typing import Literal, TypeAlias

import torch

from bilevel.validate import one_of

DType: TypeAlias = torch.dtype | Literal["float32", "float64"] | None
"""A type of PyTorch, its name, or None for the default type of PyTorch."""


def floating(dtype: DType) -> torch.dtype:
    """Return the floating-point type that `dtype` names.

    Example:
        >>> floating("float64"), floating(None)
        (torch.float64, torch.float32)

    Raises:
        BilevelError: `dtype` is not a floating-point type.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    if dtype is None:
        return torch.get_default_dtype()
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        one_of(known, dtype=dtype)
    assert isinstance(found, torch.dtype)
    return found
