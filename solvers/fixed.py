"""Plain training at hyperparameters that are given, not tuned: the baseline that every method must beat."""

from typing import Any

import torch

from bilevel import Batch, Data, Metrics, Problem, Solution
from bilevel.params import count_examples
from bilevel.solvers.base.training import Training
from bilevel.solvers.hyper_schedules import Constant, Gaussian, HyperSchedule
from bilevel.solvers.optim.optimized import SGD, MakeOptimizer, MakeScheduler


class Fixed(Training):
    """w descends L_T(λ, ·) at the λ that it was given.

    Args:
        hypers: the rule for λ: its initial values (by default), those `Replayed` of another run, `Gaussian` or `Sinusoidal`.
        inner_steps: training batches per round.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
    """

    tunes = False

    def __init__(
        self,
        *,
        hypers: HyperSchedule | None = None,
        inner_steps: int = 5,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
        )
        self.hypers = Constant() if hypers is None else hypers

    def setup(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().setup(problem, data, device, generator)
        self.hypers.setup(problem.space, self.weights.leaves[0])

    def inner_step(self, batch: Batch) -> Metrics:
        before = self.inner_count - 1  # this step is counted already
        return self.descend_at(
            self.hypers.draw(before, count_examples(batch), self.generator), batch
        )

    def uncapturable(self) -> str | None:
        if isinstance(self.hypers, (Constant, Gaussian)):
            return None
        return f"{type(self.hypers).__name__} hyperparameters depend on the number of the step, which lies on the host"

    def solution(self) -> Solution:
        return Solution(self.hypers.at(self.inner_count), self.weights.detached(), self.carry)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"hypers": self.hypers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hypers.load_state_dict(state["hypers"])
        super().load_state_dict(state)
