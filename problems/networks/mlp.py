"""A fully connected network with dropout sites."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from bilevel.problems.networks.building_blocks import Drop, check_widths, keep


class MLP(nn.Module):
    """A fully connected ReLU network on flattened inputs, with the layer sizes n₀, n₁, …, n_L.

    Dropout site 0 is the input, and site i is the output of hidden layer i. So there are L sites,
    one before each layer of weights.

    Args:
        sizes: n₀, n₁, …, n_L.

    Example:
        >>> import torch
        >>> MLP([64, 32, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    Raises:
        BilevelError: a hidden layer has no unit.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        check_widths(hidden=sizes[1:-1])
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)
        )

    def forward(
        self, x: Float[Tensor, "batch *shape"], drop: Drop = keep
    ) -> Float[Tensor, "batch classes"]:
        x = rearrange(x, "batch ... -> batch (...)")
        for site, layer in enumerate(self.layers):
            x = layer(drop(site, F.relu(x) if site else x))
        return x
