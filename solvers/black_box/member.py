"""The members of a population: trainings side by side, and a copy of the best."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import Carry, Params
from bilevel.params import to_device
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.settings import Values, apply_to_groups


@dataclass
class Member:
    """One training of the population; `score` is its last loss on the validation split."""

    weights: Optimized
    carry: Carry
    u: Tensor
    steps: int = 0
    score: float | None = None

    def state_dict(self) -> dict[str, Any]:
        weights = self.weights.state_dict()
        return {
            "weights": weights,
            "carry": self.carry,
            "u": self.u,
            "steps": self.steps,
            "score": self.score,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.u.copy_(state["u"])
        self.carry = to_device(state["carry"], self.u.device)
        self.steps, self.score = state["steps"], state["score"]

    @property
    def rank(self) -> float:
        """The score; ∞ if there is none or it is not finite."""
        finite = self.score is not None and math.isfinite(self.score)
        return self.score if self.score is not None and finite else math.inf

    @property
    def is_finite(self) -> bool:
        """Return whether all weights are finite; this waits for the device."""
        return all(bool(torch.isfinite(w).all()) for w in self.weights.tensors.values())

    def copy_from(self, donor: "Member") -> None:
        """Take over weights, memory, schedule, carry and λ of the donor."""
        state = donor.weights.state_dict()
        self.weights.load_state_dict(state | {"schedule": copy.deepcopy(state["schedule"])})
        self.carry = copied(donor.carry)
        self.u.copy_(donor.u)


@dataclass
class Best:
    """A copy of the member with the lowest score so far, as it was at that score."""

    u: Tensor
    params: Params
    carry: Carry
    score: float


def set_settings(trained: Optimized, before: Values, after: Values) -> None:
    """Change tuned settings from `before` to `after`.

    A schedule's factor of the rate and the proportions between groups of parameters stay.
    """
    groups = trained.optimizer.param_groups
    apply_to_groups(groups, {key: value for key, value in after.items() if key != "lr"})
    if "lr" not in after:
        return
    for group in groups:
        for rate in {"lr", "initial_lr"} & group.keys():
            group[rate] = group[rate] / before["lr"] * after["lr"]
    if trained.scheduler is not None and hasattr(trained.scheduler, "base_lrs"):
        trained.scheduler.base_lrs = [group["initial_lr"] for group in groups]


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy that shares no memory."""
    return {name: t.detach().clone() for name, t in tensors.items()}
