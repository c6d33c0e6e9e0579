"""Floating-point types by name, as a configuration gives them."""

from typing import Literal, TypeAlias

import torch

from bilevel import BilevelError
from bilevel.text import near

DType: TypeAlias = torch.dtype | Literal["float32", "float64"] | None
"""A type of PyTorch's, its name, or None for PyTorch's default."""


def floating(dtype: DType) -> torch.dtype:
    """The type that is meant.

    Example:
        >>> floating("float64"), floating(None)
        (torch.float64, torch.float32)

    Raises:
        BilevelError: it is no floating-point type.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    found = (
        torch.get_default_dtype()
        if dtype is None
        else known.get(dtype, dtype)
        if isinstance(dtype, str)
        else dtype
    )
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise BilevelError(
            f"dtype={dtype!r}{near(str(dtype), known)} is no floating-point type; give {' or '.join(known)}"
        )
    return found
