"""Learning-rate schedules that PyTorch lacks."""

from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bilevel import BilevelError


class NonMonotone(ReduceLROnPlateau):
    """Lower the learning rate when the validation loss is not below the best of all epochs but the last `window`.

        lr ← factor · lr    if    v_t ≥ min(v_1, …, v_{t−1−window})

    `ReduceLROnPlateau` waits as long for the first drop, but then begins to count anew, and it asks whether there was a new
    best where this asks whether the last loss is one.

    Args:
        optimizer: whose learning rates are lowered.
        factor: of a drop.
        window: how many epochs before this one do not count.

    Source: Merity, Keskar & Socher, ICLR 2018 (the trigger of NT-ASGD); MacKay et al., ICLR 2019 (as a schedule).

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
            raise BilevelError(
                f"factor={factor} does not lower a learning rate; choose one between 0 and 1"
            )
        if window < 1:
            raise BilevelError(f"window={window} is below 1; choose window ≥ 1")
        super().__init__(optimizer, factor=factor)
        self.window = window
        self.history: list[float] = []

    def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]  # as its parent's at run time
        before, loss = self.history[: -self.window], float(metrics)
        if before and not loss < min(before):
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor
        self.history.append(loss)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
