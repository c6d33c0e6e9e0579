"""Networks, plain modules with named places where a problem may put dropout."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Drop: TypeAlias = Callable[[int, Tensor], Tensor]
"""What happens to the activations x [B, …] at dropout site i: drop(i, x)."""


def keep(site: int, x: Tensor) -> Tensor:
    """No dropout at any site."""
    return x


class MLP(nn.Module):
    """A fully connected ReLU network on flattened inputs, with the layer sizes n₀, n₁, …, n_L.

    Dropout site 0 is the input, site i the output of hidden layer i: there are L of them, one before each layer of weights.

    Example:
        >>> import torch
        >>> MLP([64, 32, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))

    def forward(self, x: Float[Tensor, "batch *shape"], drop: Drop = keep) -> Float[Tensor, "batch classes"]:
        x = rearrange(x, "batch ... -> batch (...)")
        for site, layer in enumerate(self.layers):
            x = layer(drop(site, F.relu(x) if site else x))
        return x
