"""The one outer loop: train near λ₀, then descend L_V(λ, ŵ(λ)), with ŵ whatever the solver answers, differentiable in λ."""

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, BilevelError, Data, Metrics, Params, Problem, Solution, Solver
from bilevel.params import count_examples
from solvers.belief import Belief
from solvers.trained import MakeOptimizer, MakeScheduler, Trained, descend

SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.03, momentum=0.9)
RMSPROP: MakeOptimizer = partial(torch.optim.RMSprop, lr=0.03)


class Descent(Solver):
    """Rounds of `inner_steps` updates of w (and of what answers ŵ) and `outer_steps` updates of λ.

    A subclass trains in `inner_step` and answers ŵ(u₀ + offset) in `respond`; direct and indirect terms of the hypergradient
    then add up by autograd itself:

        dL_V/du = ∂_λ L_V · dλ/du + ∂_w L_V · dŵ/du

    Attributes:
        weights: w and its optimizer.
        belief: u, u₀, σ and their optimizers.
    """

    weights: Trained
    belief: Belief

    def __init__(
        self,
        *,
        inner_steps: int,
        outer_steps: int,
        inner_optimizer: MakeOptimizer,
        inner_scheduler: MakeScheduler | None,
        clip_norm: float | None,
        outer_optimizer: MakeOptimizer,
        scale_optimizer: MakeOptimizer | None,
        entropy_weight: float,
    ) -> None:
        for name, value, least in (
            ("inner_steps", inner_steps, 1),
            ("outer_steps", outer_steps, 1),
            ("entropy_weight", entropy_weight, 0),
        ):
            if value < least:
                raise BilevelError(f"{name}={value} is below {least}; choose {name} ≥ {least}")
        if clip_norm is not None and clip_norm <= 0:
            raise BilevelError(
                f"clip_norm={clip_norm} would stop all training; choose a positive norm, or null for no clipping"
            )
        self.inner_steps, self.outer_steps = inner_steps, outer_steps
        self.inner_optimizer, self.inner_scheduler, self.clip_norm = inner_optimizer, inner_scheduler, clip_norm
        self.outer_optimizer, self.scale_optimizer, self.entropy_weight = outer_optimizer, scale_optimizer, entropy_weight

    @abstractmethod
    def inner_step(self, batch: Batch) -> Metrics:
        """Train w, and whatever answers ŵ, on one training batch at λ₀."""

    @abstractmethod
    def respond(self, offset: Tensor) -> Params:
        """ŵ(u₀ + offset), differentiable in offset [h] or [B, h] alone."""

    @abstractmethod
    def trained(self) -> dict[str, Trained]:
        """What the inner phase trains, by name: scheduled and saved."""

    def setup(self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator) -> None:
        self.problem, self.data, self.device, self.generator = problem, data, device, generator
        params, self.carry = self.initial(problem, device, generator)
        self.weights = Trained(params, self.inner_optimizer, self.inner_scheduler, self.clip_norm)

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        metrics: Metrics = {}
        for _ in range(self.inner_steps if limit is None else min(limit, self.inner_steps)):
            self.inner_count += 1
            metrics |= self.inner_step(self.data.train.next())
        if not warmup:
            for _ in range(self.outer_steps):
                metrics |= self.outer_step(self.data.valid.next())
                self.outer_count += 1
            self.belief.recentre()
        return metrics

    def outer_step(self, batch: Batch) -> Metrics:
        """(u, s) descend L_V(λ(u₀ + δ), ŵ(u₀ + δ)) − τ H[N(u, σ²)], with δ = u − u₀ + ε and dropout and augmentation off."""
        offset = self.belief.offset(count_examples(batch), self.generator)
        hypers = self.problem.space.constrain(self.belief.centre + offset)
        loss, _ = self.problem.outer_loss(hypers, self.respond(offset), self.carry, batch)
        entropy = self.belief.entropy()
        self.watch(loss)
        descend(loss - self.entropy_weight * entropy, *self.belief.trained())
        return {"outer_loss": loss.detach(), "entropy": entropy.detach()}

    def solution(self) -> Solution:
        with torch.no_grad():
            hypers = self.problem.space.constrain(self.belief.centre)
            return Solution(hypers, self.effective_weights(), self.carry)

    def effective_weights(self) -> Params:
        """The weights that go with λ₀."""
        return self.weights.detached()

    def scales(self) -> dict[str, Tensor]:
        return self.belief.scales()

    def epoch_ended(self, valid_loss: float | None) -> None:
        for group in self.trained().values():
            group.epoch_ended(valid_loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "trained": {name: group.state_dict() for name, group in self.trained().items()},
            "belief": self.belief.state_dict(),
            "carry": self.carry,
            "generator": self.generator.get_state(),
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, group in self.trained().items():
            group.load_state_dict(state["trained"][name])
        self.belief.load_state_dict(state["belief"])
        self.carry = {name: t.to(self.device) for name, t in state["carry"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]
