"""The size of what the hypergradient loses if batch-norm statistics are constants in it."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import Params
from bilevel.solvers.base.core import Core
from bilevel.solvers.response.row_counts import PER_BATCH

SMALL_EFFECT = 0.01
"""Relative change of the hypergradient, from which on a warning is due."""


class ConstantStatistics:
    """Warn once if statistics that follow w would change the hypergradient.

    With one perturbation for each example they cannot follow (`docs/mathematics.md`).

    Args:
        core: the core of the solver.
        respond: returns ŵ(u₀ + offset), differentiable in the offset.
    """

    def __init__(self, core: Core, respond: Callable[[Tensor], Params]) -> None:
        self.core = core
        self.respond = respond
        self.warned = False

    def warnings(self, name: str) -> dict[str, str]:
        """Return a warning of the solver `name`, by kind; {} after the first one."""
        if self.warned or not (effect := self.effect()) > SMALL_EFFECT:
            return {}
        self.warned = True
        return {
            "statistics": f"{name}: the hypergradient takes batch-norm statistics as constants, "
            "since perturbations vary from example to example; on one batch, statistics that "
            f"follow w would change it by {effect:.0%}; {PER_BATCH}, which lets them follow, or "
            "use a norm without running statistics (group norm)"
        }

    def effect(self) -> float:
        """Return ‖g − g₀‖/‖g‖ of the hypergradients with moving and with constant statistics.

        Both are unperturbed and on the next batches, and nothing moves. The result is NaN before Θ
        has trained.
        """
        core, u = self.core, self.core.search.u
        training, batch = core.data.train.peek(), core.data.valid.peek()
        draws = core.generator.get_state()
        gradients: list[Tensor] = []
        for moving in (True, False):
            offset = u - core.search.u0
            hypers = core.problem.space.constrain(core.search.u0 + offset)
            params = self.respond(offset)
            carry = core.problem.outer_carry(core.carry, core.last_outer_carry, batch)
            if moving:
                carry = core.moving_statistics(hypers, params, carry, training)
            with core.without_cudnn():
                loss, _ = core.problem.outer_loss(hypers, params, carry, batch)
            gradients += torch.autograd.grad(loss, u, materialize_grads=True)
        core.generator.set_state(draws)
        return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
