"""Plain training at the initial hyperparameters: the baseline that every method must beat."""

import torch

from bilevel import Batch, Data, Metrics, Problem, Solution
from solvers.trained import SGD, MakeOptimizer, MakeScheduler
from solvers.training import Training


class Fixed(Training):
    """w descends L_T(λ, ·) at the λ that it was given.

    Args:
        inner_steps: training batches per round.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
    """

    tunes = False

    def __init__(
        self,
        *,
        inner_steps: int = 5,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps, inner_optimizer=inner_optimizer, inner_scheduler=inner_scheduler, clip_norm=clip_norm
        )

    def setup(self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator) -> None:
        super().setup(problem, data, device, generator)
        like = self.weights.leaves[0]
        self.u = problem.space.init(like.dtype).to(like)

    def inner_step(self, batch: Batch) -> Metrics:
        return self.descend_inner(self.u, batch)

    def solution(self) -> Solution:
        return Solution(self.problem.space.constrain(self.u), self.weights.detached(), self.carry)
