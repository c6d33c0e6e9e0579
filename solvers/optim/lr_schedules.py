"""Learning-rate schedules that PyTorch lacks."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from bilevel.validate import finite, positive, whole, wrong


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
    """Hold the learning rate for a part of the epochs, and then lower it along a half cosine.

        lr_t = lr₀                                                        for t ≤ hold · total
        lr_t = lr₀ · ½ (1 + cos(π (t − hold · total) / ((1 − hold) total)))    after it

    λ is best tuned while the rate is constant: then the response is that of a steady w, and λ does
    not chase the schedule. `runner.tune_fraction=hold` freezes λ where the rate falls.

    Args:
        optimizer: the optimizer of the learning rates.
        total: the number of epochs in all; the rate stays at zero after them.
        hold: the part of them at the constant rate, in [0, 1).

    Source: Hu et al., MiniCPM, 2024 (warmup-stable-decay); Hägele et al., NeurIPS 2024.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule, rates = ConstantThenCosine(optimizer, total=4, hold=0.5), []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 1.0, 0.5, 0.0]

    Raises:
        BilevelError: `total` is not positive, or `hold` is outside [0, 1).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, total: float, hold: float = 0.7
    ) -> None:
        positive(total=total)
        finite(hold=hold)
        if not 0 <= hold < 1:
            raise wrong("hold", hold, "must be at least 0 and below 1", "0.7 holds it for 70 %")
        self.total, self.hold = total, hold
        super().__init__(optimizer, self._factor)

    def _factor(self, epoch: int) -> float:
        part = (epoch / self.total - self.hold) / (1 - self.hold)
        return 0.5 * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0)))
