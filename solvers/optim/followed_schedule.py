"""Learning rates that follow the schedule of another optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class FollowedSchedule:
    """The learning rates of some optimizers, with the factor that a schedule has reached.

        lr ← lr₀ · (lr_w / lr_w₀)

    Here lr_w is the present learning rate of the leader, of its first group of parameters, and
    lr_w₀ is its initial one. A learning rate of w that λ holds has no part in the factor: the
    optimizer keeps the value of its schedule.

    Args:
        leader: the optimizer with the schedule.
        followers: the optimizers that follow it; their learning rates are the initial ones.

    Example:
        >>> leader, follower = (torch.optim.SGD([torch.zeros(1)], lr=lr) for lr in (0.1, 0.03))
        >>> schedule = FollowedSchedule(leader, [follower])
        >>> leader.param_groups[0]["lr"] = 0.05
        >>> schedule.follow()
        >>> follower.param_groups[0]["lr"]
        0.015
    """

    def __init__(
        self, leader: torch.optim.Optimizer, followers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.leader = leader
        self.followers = followers
        self.initial = _initial_rate(leader.param_groups[0])
        self.rates = [[_initial_rate(group) for group in f.param_groups] for f in followers]

    @property
    def factor(self) -> float:
        """Return lr_w / lr_w₀."""
        now = self.leader.param_groups[0].get("lr")
        return float(now) / self.initial if now is not None and self.initial else 1.0

    def follow(self) -> None:
        """Set the learning rates of the followers."""
        factor = self.factor
        for follower, rates in zip(self.followers, self.rates, strict=True):
            for group, rate in zip(follower.param_groups, rates, strict=True):
                if isinstance(lr := group.get("lr"), Tensor):
                    lr.fill_(rate * factor)
                elif lr is not None:
                    group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the initial learning rates."""
        return {"initial": self.initial, "rates": self.rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.initial, self.rates = state["initial"], [list(rates) for rates in state["rates"]]


def _initial_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group before its schedule; 0 if it has none."""
    return float(group.get("initial_lr", group.get("lr")) or 0.0)
