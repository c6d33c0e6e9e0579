"""First-order descent: λ follows the direct term of the hypergradient alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import Batch, Metrics, Need, Params, Refused
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import BestResponse


@dataclass(kw_only=True, eq=False)
class FirstOrder(Descent):
    """w descends L_T and λ descends L_V in turn, each while the other is held.

        ŵ(u) = w,    ∂ŵ/∂u = 0,    so that    dL_V/du = ∂_λ L_V · dλ/du

    This is first-order DARTS. It costs one pass through the network and follows a hypergradient
    that is biased wherever w*(λ) moves. A hyperparameter on which L_V does not depend directly
    would never move, and is refused. DARTS takes one inner step per round.

    Source: Liu, Simonyan & Yang, ICLR 2019, section 2.3 (ξ = 0).
    """

    needs = frozenset({Need.OUTER_DERIVATIVE})

    inner_steps: int = 1

    def start(self, core: Core) -> "FirstOrderMethod":
        """Return the method, which has no state."""
        return FirstOrderMethod(core)


class FirstOrderMethod(BestResponse):
    """Plain training at λ₀, with w as a constant response."""

    extends = True

    def __init__(self, core: Core) -> None:
        self.core = core

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of w on L_T(λ₀, ·)."""
        return self.core.descend_inner(self.core.hypers(), *batches)

    def respond(self, offset: Tensor) -> Params:
        """Return w, as a constant."""
        return self.core.weights.detached()

    def before_dry_run(self) -> None:
        """Refuse a hyperparameter without a direct term."""
        core, space = self.core, self.core.problem.space
        batch, hypers = core.data.valid.peek(), space.constrain(core.search.u0)
        tuned = {name: hypers[name].detach().requires_grad_() for name in space.tuned}
        carry = core.problem.outer_carry(core.carry, None, batch)
        loss, _ = core.problem.outer_loss(hypers | tuned, core.weights.detached(), carry, batch)
        gradients = (
            torch.autograd.grad(loss, list(tuned.values()), allow_unused=True)
            if loss.requires_grad
            else [None] * len(tuned)
        )
        for name, gradient in zip(tuned, gradients, strict=True):
            if gradient is not None and space[name].differentiable:
                continue
            absent = "L_V does not depend on it directly"
            why = absent if gradient is None else "it is sampled or rounded"
            raise Refused(
                f"FirstOrder follows ∂L_V/∂λ alone, and `{name}` has none ({why}); tune it with a "
                "solver that approximates how w*(λ) moves (self-tuning, unrolled, implicit), or "
                f"freeze it (problem.space.{name}.frozen=true)"
            )
