"""Plain training at the initial hyperparameters: the baseline that every method must beat."""

from typing import Any

import torch

from bilevel import BilevelError, Data, Metrics, Problem, Solution, Solver
from solvers.descent import SGD
from solvers.trained import MakeOptimizer, MakeScheduler, Trained, descend


class Fixed(Solver):
    """w descends L_T(λ, ·) at the λ that it was given.

    Args:
        inner_steps: training batches per round.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
    """

    def __init__(
        self,
        *,
        inner_steps: int = 5,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if inner_steps < 1:
            raise BilevelError(f"inner_steps={inner_steps} is below 1; choose inner_steps ≥ 1")
        self.inner_steps, self.inner_optimizer, self.inner_scheduler, self.clip_norm = (
            inner_steps,
            inner_optimizer,
            inner_scheduler,
            clip_norm,
        )

    def setup(self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator) -> None:
        self.problem, self.data, self.device, self.generator = problem, data, device, generator
        params, self.carry = self.initial(problem, device, generator)
        self.weights = Trained(params, self.inner_optimizer, self.inner_scheduler, self.clip_norm)
        like = self.weights.leaves[0]
        self.u = problem.space.init(like.dtype).to(like)

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        metrics: Metrics = {}
        for _ in range(self.inner_steps if limit is None else min(limit, self.inner_steps)):
            self.inner_count += 1
            hypers = self.problem.space.constrain(self.u, self.generator)
            loss, carry = self.problem.inner_loss(
                hypers, self.weights.tensors, self.carry, self.data.train.next(), self.generator
            )
            self.watch(loss)
            descend(loss, self.weights)
            self.carry = {name: t.detach() for name, t in carry.items()}
            metrics = {"inner_loss": loss.detach()}
        return metrics

    def solution(self) -> Solution:
        return Solution(self.problem.space.constrain(self.u), self.weights.detached(), self.carry)

    def epoch_ended(self, valid_loss: float | None) -> None:
        self.weights.epoch_ended(valid_loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights.state_dict(),
            "carry": self.carry,
            "generator": self.generator.get_state(),
            "inner_count": self.inner_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.carry = {name: t.to(self.device) for name, t in state["carry"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.inner_count = state["inner_count"]
