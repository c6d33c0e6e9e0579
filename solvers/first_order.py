"""The direct term alone: λ descends L_V as if the weights did not answer it."""

import torch
from torch import Tensor

from bilevel import Params, Refused
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler


class FirstOrder(Descent):
    """w descends L_T, λ descends L_V, in turn, each with the other held.

        ŵ(u) = w,    ∂ŵ/∂u = 0,    so that    dL_V/du = ∂_λ L_V · dλ/du

    It is first-order DARTS, which costs one pass through the network and follows a biased hypergradient wherever w*(λ) moves.
    A hyperparameter that L_V does not hold itself would never move, and is refused.

    Args:
        inner_steps: training batches per round (DARTS: 1).
        outer_steps: validation batches per round.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm of w.
        outer_optimizer: for u.

    Source: Liu, Simonyan and Yang, ICLR 2019, section 2.3 (ξ = 0).
    """

    def __init__(
        self,
        *,
        inner_steps: int = 1,
        outer_steps: int = 1,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )

    def respond(self, offset: Tensor) -> Params:
        return self.weights.detached()

    def rehearse(self) -> None:
        space, batch = self.problem.space, self.data.valid.peek()
        hypers = space.constrain(self.belief.centre)
        tuned = {name: hypers[name].detach().requires_grad_() for name in space.tuned}
        carry = self.problem.outer_carry(self.carry, None, batch)
        loss, _ = self.problem.outer_loss(
            {**hypers, **tuned}, self.weights.detached(), carry, batch
        )
        found = (
            torch.autograd.grad(loss, list(tuned.values()), allow_unused=True)
            if loss.requires_grad
            else [None] * len(tuned)
        )
        for name, gradient in zip(tuned, found, strict=True):
            if gradient is None or not space[name].differentiable:
                why = (
                    "L_V does not depend on it directly"
                    if gradient is None
                    else "it is sampled or rounded"
                )
                raise Refused(
                    f"{type(self).__name__} follows ∂L_V/∂λ alone, and `{name}` has none ({why}); tune it with a solver that "
                    "answers how w*(λ) moves (self-tuning, unrolled, implicit), or freeze it "
                    f"(problem.space.{name}.frozen=true)"
                )
        super().rehearse()
