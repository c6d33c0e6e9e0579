"""Δ-STN with its linearization done by double backward, as the official code does it."""

from functools import partial

from torch import Tensor

from bilevel import Batch, Carry, Hypers, Params, Prediction
from bilevel.solvers import SelfTuning
from bilevel.solvers.autodiff.linearization import double_backward


class DoubleBackward(SelfTuning):
    """Δ-STN whose tangent ẏ = J_w f · Θε is the derivative of v ↦ ∂(vᵀ f(x; w₀ + Θδ))/∂δ · ε at δ = 0.

    The response is evaluated where it is zero, and the network is gone through backward before the loss is. Spared here is what
    the official code computes beyond, the gradients of w₀ and λ; those of Θ are the same as `solvers.delta_stn`'s.
    """

    def linearized(
        self, hypers: Hypers, base: Params, offset: Tensor, carry: Carry, batch: Batch
    ) -> tuple[Prediction, Carry]:
        def predict(params: Params) -> tuple[Prediction, Carry]:
            return self.problem.predict(
                hypers, params, carry, batch, train=True, generator=self.generator
            )

        return double_backward(
            predict, partial(self.response.weights, self.theta.tensors, base), offset
        )
