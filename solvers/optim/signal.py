"""The signal of a noisy gradient: its running mean against the noise of that mean."""

import torch
from torch import Tensor


def squared_signal(
    mean: Tensor, square: Tensor, count: Tensor, alpha: float, beta: float
) -> Tensor:
    """Return z² = m̂² / var m̂ of every entry.

        m ← β m + (1 − β) g,    v ← α v + (1 − α) g²,    m̂ = m / (1 − βᵗ),    v̂ = v / (1 − αᵗ)
        var g = (v̂ − m̂²) / (1 − s),    var m̂ = s · var g,    s = (1 − β)(1 + βᵗ) / ((1 + β)(1 − βᵗ))

    s is the sum of the squared weights of the running mean, so 1/s is its effective number of
    gradients. Pure noise has z² near 1. The result is 0 for t = 1, since one gradient has no
    variance, and where m is 0. It is infinite where all gradients were equal.

    Args:
        mean: m.
        square: v, of the shape of m.
        count: t, [], on the same device; nothing waits for it.
        alpha: α.
        beta: β.

    Example:
        >>> t = torch.tensor(1000.0)
        >>> squared_signal(torch.tensor(0.5), torch.tensor(1.25), t, 0.99, 0.9).round(decimals=3)
        tensor(4.5000)
    """
    mean_square = (mean / (1 - beta**count)).square()
    spread = (square / (1 - alpha**count) - mean_square).clamp(min=0)
    s = (1 - beta) * (1 + beta**count) / ((1 + beta) * (1 - beta**count))
    z_squared = mean_square / (s / (1 - s) * spread)
    return torch.where((mean_square > 0) & (count > 1), z_squared, 0.0)
