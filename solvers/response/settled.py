"""A check that a trained response Θ settles: its change between two rounds far apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FIRST = 32
"""Outer rounds before the first measurement; each later one comes after twice as many."""

SAME_SIZE = 0.2
"""Relative change of ‖Θ‖ above which Θ still grows, so that nothing follows from its change."""

MOST_CHANGE = 0.6
"""Relative change of Θ at an equal size, from which on it counts as noise (37° apart)."""


class Settled:
    """Measures ‖Θ_n − Θ_{n/2}‖/‖Θ_n‖ after n = 32, 64, 128 … rounds.

    A constant response changes by 0, and independent noise of a constant size by √2.

    Attributes:
        rounds: the rounds so far.
        snapshot: Θ at the last power of two, or [] before.
        change: the last measurement, [], and the relative change of ‖Θ‖, [].
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.snapshot: list[Tensor] = []
        self.change: list[Tensor] = []

    def round_ended(self, theta: Sequence[Tensor]) -> None:
        """Count a round; measure, and keep Θ, if the number of rounds is a power of two."""
        self.rounds += 1
        if self.rounds < FIRST // 2 or self.rounds & (self.rounds - 1):
            return
        now = [t.detach().clone() for t in theta]
        if self.snapshot:
            size, before = _norm(now), _norm(self.snapshot)
            moved = _norm([a - b for a, b in zip(now, self.snapshot, strict=True)])
            self.change = [moved / size, (size - before).abs() / size]
        self.snapshot = now

    def warnings(self, name: str) -> dict[str, str]:
        """Return a warning if Θ has kept its size and lost its direction."""
        if not self.change:
            return {}
        change, growth = (float(x) for x in self.change)
        if not (change > MOST_CHANGE and growth < SAME_SIZE):
            return {}
        return {
            "noise": f"{name}: the response Θ has changed by {change:.0%} of its norm over the "
            f"last half of {self.rounds} rounds at an equal size, so it is mostly noise, and so is "
            "the hypergradient; lower the rate of Θ (solver.response_optimizer.lr), or take more "
            "inner_steps"
        }

    def state_dict(self) -> dict[str, Any]:
        """Return rounds, snapshot and measurement."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from `state`."""
        self.rounds = state["rounds"]
        self.snapshot = [t.to(device) for t in state["snapshot"]]
        self.change = [t.to(device) for t in state["change"]]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
