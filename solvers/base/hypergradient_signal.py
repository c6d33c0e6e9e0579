"""The signal-to-noise ratio of the hypergradient, kept on the device in every run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.solvers.optim.signal import squared_signal

ALPHA, BETA = 0.99, 0.9
"""The rates of the mean square and of the mean, as in `OuterRMSprop`."""

MOST = 100.0
"""The largest ratio; gradients without noise would have an infinite one."""

SAMPLE = 4096
"""About so many coordinates of a large λ are looked at."""


class HypergradientSignal:
    """The running mean of the hypergradient against its noise, over the outer steps of a run.

        z_k = |m̂_k| / sd m̂_k,    the ratio is the median of z over the coordinates k of λ

    Pure noise has a ratio near 0.7. A coordinate whose gradient was always 0 does not count.

    Args:
        like: u, [h].

    Attributes:
        mean: the running mean, [h].
        square: the running mean square, [h].
        count: the number of hypergradients, [].

    Example:
        >>> signal = HypergradientSignal(torch.zeros(3))
        >>> for _ in range(2):
        ...     ratio = signal.note(torch.ones(3))
        >>> ratio.item()
        100.0
    """

    def __init__(self, like: Tensor) -> None:
        self.mean = torch.zeros_like(like, requires_grad=False)
        self.square = torch.zeros_like(self.mean)
        self.count = torch.zeros((), dtype=self.mean.dtype, device=like.device)

    @torch.no_grad()
    def note(self, gradient: Tensor) -> Tensor:
        """Take a hypergradient in; return the ratio, []; nothing waits for the device."""
        gradient = gradient.detach().to(self.mean)
        self.mean.mul_(BETA).add_(gradient, alpha=1 - BETA)
        self.square.mul_(ALPHA).addcmul_(gradient, gradient, value=1 - ALPHA)
        self.count.add_(1)
        return self.ratio()

    def ratio(self) -> Tensor:
        """Return the median of z over the coordinates that have had a gradient, [].

        It is 0 before the second hypergradient, and at most 100.
        """
        stride = math.ceil(self.mean.numel() / SAMPLE)
        mean, square = self.mean[::stride], self.square[::stride]
        z = squared_signal(mean, square, self.count, ALPHA, BETA).sqrt().clamp(max=MOST)
        counts = square > 0
        ordered = torch.where(counts, z, math.inf).sort().values
        middle = (counts.sum() - 1).clamp(min=0) // 2
        median = ordered.gather(0, middle.reshape(1))[0]
        return torch.where(median.isfinite(), median, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running moments."""
        return {"mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
