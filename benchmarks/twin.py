"""Δ-STN with a linearization by double backward, as in the official code."""

from functools import partial

from torch import Tensor

from bilevel import Batch, Carry, Hypers, Params, Prediction
from bilevel.solvers import SelfTuning
from bilevel.solvers.autodiff.linearization import double_backward
from bilevel.solvers.base.core import Core
from bilevel.solvers.self_tuning import SelfTuningMethod


class DoubleBackward(SelfTuning):
    """Δ-STN with the linearization of `DoubleBackwardMethod`."""

    def start(self, core: Core) -> "DoubleBackwardMethod":
        """Return the method with Θ = 0."""
        return DoubleBackwardMethod(self, core)


class DoubleBackwardMethod(SelfTuningMethod):
    """Compute ẏ = J_w f · Θε as the derivative of v ↦ ∂(vᵀ f(x; w₀ + Θδ))/∂δ · ε at δ = 0.

    The response is evaluated where it is zero, and the network is gone through backward before the
    loss is. The official code also computes the gradients of w₀ and λ, which are left out here. The
    gradients of Θ equal those of `solvers.delta_stn`.
    """

    def linearized(
        self, hypers: Hypers, w0: Params, offset: Tensor, carry: Carry, batch: Batch
    ) -> tuple[Prediction, Carry]:
        """Return y₀ + ẏ and the carry after y₀."""
        predict = partial(self.core.predict, hypers, carry, batch)
        weights = partial(self.response.weights, self.theta.tensors, w0)
        return double_backward(predict, weights, offset)
