"""Products with linear maps in 16 bits, for vectors in float32."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


def widened(product: Callable[[Tensor], Result], kind: torch.dtype) -> Callable[[Tensor], Result]:
    """Return a linear map for vectors of any type; `product` takes those of type `kind`.

    A vector of another type is scaled to a largest entry of 1 before it is cast. So entries are
    rounded to 16 bits, but they neither overflow nor vanish.
    """

    def wide(q: Tensor) -> Result:
        if q.dtype == kind:
            return product(q)
        size = q.abs().amax()
        size = torch.where(size == 0, 1.0, size)
        result = product((q / size).to(kind))
        if isinstance(result, tuple):
            first, second = result
            return first.to(q.dtype) * size, second.to(q.dtype) * size
        return result.to(q.dtype) * size

    return wide
