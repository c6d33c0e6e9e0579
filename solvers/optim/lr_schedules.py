"""Learning-rate schedules that PyTorch lacks."""

from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bilevel.validate import whole, wrong


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
