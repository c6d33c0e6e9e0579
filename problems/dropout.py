"""Dropout whose rate may differ from example to example."""

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import along_examples


def dropout(
    x: Float[Tensor, "batch *shape"], rate: Float[Tensor, ""] | Float[Tensor, " batch"], generator: torch.Generator | None
) -> Float[Tensor, "batch *shape"]:
    """X ∘ m with m = Bernoulli(1 − rate)/(1 − rate), elementwise: E[x ∘ m] = x.

    The mask is a sample, so nothing is differentiated with respect to `rate`; one mask serves x and its tangent alike.

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: on the device of x.

    Example:
        >>> dropout(torch.ones(1, 4), torch.tensor(0.5), torch.Generator().manual_seed(1))
        tensor([[0., 2., 2., 0.]])
    """
    keep = 1 - along_examples(rate.detach(), x)
    mask = (torch.rand(x.shape, generator=generator, device=x.device) < keep) / keep
    return x * mask.to(x.dtype)
