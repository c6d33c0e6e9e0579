"""Generalized ridge regression: the closed forms that weight decay, an input-gradient penalty and input dropout share."""

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Hypers
from bilevel.problems.closed_form.linear_regression import Linear


class GeneralizedRidge(Linear):
    """Linear regression whose L_T is, or is on average, a least-squares fit with a weighted squared norm of w.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + ½ Σ_j c_j e^{λ_j} w_j²,    w*(λ) = (H + diag(c ∘ e^λ))⁻¹ b

    with one λ for all features or one for each, and constants c ≥ 0.

    Source: Hoerl & Kennard, Technometrics 1970, section 5.

    Attributes:
        weighting: c, [d] in float64.
    """

    weighting: Float[Tensor, " d"]

    def minimizer(self, hypers: Hypers) -> Tensor:
        """(H + diag(c ∘ e^λ))⁻¹ b, differentiable in λ."""
        return torch.linalg.solve(self.hessian(hypers), self.moment)

    def response_columns(self, hypers: Hypers, w: Tensor) -> dict[str, Tensor]:
        """−(H + diag(c ∘ e^λ))⁻¹ diag(c ∘ e^λ ∘ w*); with one λ for all, the sum of its columns."""
        (name,) = self.penalized
        mixed = torch.diag(self._strength(hypers) * w)
        return {
            name: -torch.linalg.solve(
                self.hessian(hypers), mixed.sum(1, True) if self.space[name].shape == () else mixed
            )
        }

    def starts(self, h: int) -> Tensor:
        """The same λ for all features."""
        return torch.linspace(-12, 6, 73, dtype=torch.float64)[:, None].expand(73, h)

    def hessian(self, hypers: Hypers) -> Float[Tensor, "d d"]:
        """∂²L_T/∂w² = H + diag(c ∘ e^λ), the same at every w."""
        return self.gram + torch.diag(self._strength(hypers))

    def _strength(self, hypers: Hypers) -> Float[Tensor, " d"]:
        (name,) = self.penalized
        return self.weighting * hypers[name].to(self.gram).exp()
