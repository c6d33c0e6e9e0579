"""Learning-rate schedules that PyTorch lacks."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from bilevel.validate import at_least, whole, wrong


class NonMonotone(ReduceLROnPlateau):
    """Lower the learning rate if the validation loss did not improve on that of earlier epochs.

        lr ← factor · lr    if    v_t ≥ min(v_1, …, v_{t−1−window})

    The last `window` epochs do not count. `ReduceLROnPlateau` differs in two ways: after a drop it
    starts to count anew, and it asks whether there was a new best loss, not whether the last loss
    is one.

    Args:
        optimizer: the optimizer of the learning rates.
        factor: the factor of one drop, in (0, 1).
        window: the number of epochs before the present one that do not count.

    Source: Merity, Keskar & Socher, ICLR 2018 (the trigger of NT-ASGD); MacKay et al., ICLR 2019
        (as a schedule).

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = NonMonotone(optimizer, window=2)
        >>> for loss in (5.0, 3.0, 4.0, 4.0, 4.0):
        ...     schedule.step(loss)
        >>> optimizer.param_groups[0]["lr"]
        0.25

    Raises:
        BilevelError: a factor outside (0, 1), or a window below 1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, factor: float = 0.25, window: int = 5
    ) -> None:
        if not 0 < factor < 1:
            raise wrong("factor", factor, "must be between 0 and 1", "0.25 lowers lr to a quarter")
        whole(1, window=window)
        super().__init__(optimizer, factor=factor)
        self.window = window
        self.history: list[float] = []

    # the stubs of PyTorch name other types than its code
    def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]
        before, loss = self.history[: -self.window], float(metrics)
        if before and not loss < min(before):
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor
        self.history.append(loss)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class ConstantThenCosine(LambdaLR):
    """Hold the learning rate for some epochs, and then lower it to zero along a half cosine.

        lr_t = lr₀                                        for t ≤ hold
        lr_t = lr₀ · ½ (1 + cos(π (t − hold) / (total − hold)))    after it

    λ is tuned best while the rate is constant: then the response is that of a steady w, and λ does
    not chase the schedule. `runner.tune_fraction=hold/total` freezes it where the rate falls.

    Args:
        optimizer: the optimizer of the learning rates.
        hold: the number of epochs at the constant rate.
        total: the number of epochs in all; the rate stays at zero after them.

    Source: Hu et al., MiniCPM, 2024 (warmup-stable-decay); Hägele et al., NeurIPS 2024.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule, rates = ConstantThenCosine(optimizer, hold=2, total=4), []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 1.0, 0.5, 0.0]

    Raises:
        BilevelError: `hold` is negative, or `total` is not above it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, hold: float, total: float) -> None:
        at_least(0, hold=hold)
        if not hold < total < math.inf:
            raise wrong("total", total, f"must be above hold={hold:g}", "use the epochs of the run")
        self.hold, self.total = hold, total
        super().__init__(optimizer, self._factor)

    def _factor(self, epoch: int) -> float:
        part = (epoch - self.hold) / (self.total - self.hold)
        return 0.5 * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0)))
