"""A multilayer perceptron on tables, with noise on its inputs and on its hidden units."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bilevel.params import along_examples


class TabularNetwork(nn.Module):
    """Linear layers with ReLU between them; in training with Gaussian noise.

        x ← x + σ n,    h ← h (1 + √(p / (1 − p)) n),    n ~ N(0, I)

    The second line is Gaussian dropout (Srivastava et al., JMLR 2014, section 10), which has a
    derivative in p.

    Args:
        sizes: the numbers of features, of the units of each hidden layer, and of outputs.

    Example:
        >>> network = TabularNetwork([3, 8, 2]).eval()
        >>> network(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairs)

    def forward(
        self, x: Tensor, input_noise: Tensor | None = None, dropout: Tensor | None = None
    ) -> Tensor:
        """Return the outputs, [B, outputs], of standardized features, [B, features].

        Args:
            x: the features.
            input_noise: σ, [] or [B]; None for no noise.
            dropout: p, [] or [B]; None for no dropout.
        """
        if self.training and input_noise is not None:
            x = x + along_examples(input_noise, x) * torch.randn_like(x)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
            if self.training and dropout is not None:
                scale = (dropout / (1 - dropout)).sqrt()
                x = x * (1 + along_examples(scale, x) * torch.randn_like(x))
        outputs: Tensor = self.layers[-1](x)
        return outputs
