"""Solvers that write the hypergradient down, where others let autograd find it behind ŵ."""

from abc import abstractmethod

from torch import Tensor

from bilevel import Batch, Metrics, Params
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.optim.optimized import apply_gradients


class Explicit(Descent):
    """λ follows a hypergradient that `differentiate` gives; ŵ is w, as a constant."""

    @abstractmethod
    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """L_V on `batch`, the hypergradient [h] on it and on the last training batch, and what was measured."""

    def outer_step(self, batch: Batch) -> Metrics:
        loss, gradient, metrics = self.differentiate(batch)
        self.watch(loss)
        apply_gradients([gradient], self.belief.mean)
        return metrics | {"outer_loss": loss, "hypergradient_norm": gradient.norm()}

    def outer_loss(self, batch: Batch) -> Tensor:
        """L_V with the hypergradient as its derivative in u."""
        loss, gradient, _ = self.differentiate(batch)
        return loss + gradient @ (self.belief.u - self.belief.u.detach())

    def respond(self, offset: Tensor) -> Params:
        """The weights, as constants: `outer_loss` adds what they do to the hypergradient."""
        return self.weights.detached()
