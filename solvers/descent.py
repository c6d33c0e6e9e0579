"""The one outer loop: train near λ₀, then descend L_V(λ, ŵ(λ)), with ŵ whatever the solver answers, differentiable in λ."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Hypers, Metrics, Params, Solution
from bilevel.params import count_examples
from solvers.belief import Belief
from solvers.trained import MakeOptimizer, MakeScheduler, descend
from solvers.training import Training, at_least


class Descent(Training):
    """Rounds of `inner_steps` updates of w (and of what answers ŵ) and `outer_steps` updates of λ.

    A subclass trains in `inner_step` and answers ŵ(u₀ + offset) in `respond`; direct and indirect terms of the hypergradient
    then add up by autograd itself:

        dL_V/du = ∂_λ L_V · dλ/du + ∂_w L_V · dŵ/du

    Attributes:
        belief: u, u₀, σ and their optimizers.
        recurrent: whether the network has fused recurrent layers, which cuDNN does not differentiate in evaluation mode.
    """

    belief: Belief
    recurrent: bool = False

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
        super().__init__(
            inner_steps=inner_steps, inner_optimizer=inner_optimizer, inner_scheduler=inner_scheduler, clip_norm=clip_norm
        )
        at_least(outer_steps=outer_steps, least=1)
        at_least(entropy_weight=entropy_weight, least=0)
        self.outer_steps, self.outer_optimizer, self.scale_optimizer = outer_steps, outer_optimizer, scale_optimizer
        self.entropy_weight = entropy_weight

    @abstractmethod
    def respond(self, offset: Tensor) -> Params:
        """ŵ(u₀ + offset), differentiable in offset [h] or [B, h] alone."""

    def outer_phase(self) -> Metrics:
        metrics: Metrics = {}
        for _ in range(self.outer_steps):
            self.outer_count += 1
            metrics = self.outer_step(self.data.valid.next())
        self.belief.recentre()
        return metrics

    def outer_step(self, batch: Batch) -> Metrics:
        """(u, s) descend L_V(λ(u₀ + δ), ŵ(u₀ + δ)) − τ H[N(u, σ²)], with δ = u − u₀ + ε and dropout and augmentation off."""
        loss, entropy = self.outer_loss(batch), self.belief.entropy()
        self.watch(loss)
        descend(loss - self.entropy_weight * entropy, *self.belief.trained())
        return {"outer_loss": loss.detach(), "entropy": entropy.detach()}

    def outer_loss(self, batch: Batch) -> Tensor:
        """L_V(λ(u₀ + δ), ŵ(u₀ + δ)) with a fresh draw of δ."""
        offset = self.belief.offset(count_examples(batch), self.generator)
        hypers = self.problem.space.constrain(self.belief.centre + offset)
        carry = self.problem.fresh_carry(self.carry, batch)
        with self._without_cudnn():
            return self.problem.outer_loss(hypers, self.respond(offset), carry, batch)[0]

    def _without_cudnn(self) -> AbstractContextManager[Any]:
        return torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext()

    def solution(self) -> Solution:
        with torch.no_grad():
            hypers = self.problem.space.constrain(self.belief.centre)
            return Solution(hypers, self.effective_weights(), self.carry)

    def effective_weights(self) -> Params:
        """The weights that go with λ₀."""
        return self.weights.detached()

    def scales(self) -> Hypers:
        return self.belief.scales()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"belief": self.belief.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.belief.load_state_dict(state["belief"])
