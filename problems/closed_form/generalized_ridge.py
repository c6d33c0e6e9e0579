"""Closed forms that weight decay, an input-gradient penalty and input dropout share."""

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Hypers
from bilevel.problems.closed_form.linear_regression import Linear


class GeneralizedRidge(Linear):
    """Generalized ridge regression: least squares with a weighted squared norm of w.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + ½ Σ_j c_j e^{λ_j} w_j²
        w*(λ)     = (H + diag(c ∘ e^λ))⁻¹ b

    There is one λ for all features or one per feature, and constants c ≥ 0. L_T may have this form
    on average only.

    Source: Hoerl & Kennard, Technometrics 1970, section 5.

    Attributes:
        weighting: c, [d] in float64.
    """

    weighting: Float[Tensor, " d"]

    def minimizer(self, hypers: Hypers) -> Tensor:
        """Return (H + diag(c ∘ e^λ))⁻¹ b, differentiable in λ."""
        return torch.linalg.solve(self.hessian(hypers), self.moment)

    def response_columns(self, hypers: Hypers, w: Tensor) -> dict[str, Tensor]:
        """Return −(H + diag(c ∘ e^λ))⁻¹ diag(c ∘ e^λ ∘ w*); with one λ, the sum of its columns."""
        (name,) = self.penalized
        mixed = torch.diag(self._strength(hypers) * w)
        mixed = mixed.sum(1, True) if self.space[name].shape == () else mixed
        return {name: -torch.linalg.solve(self.hessian(hypers), mixed)}

    def starts(self, h: int) -> Tensor:
        """Return a grid with the same λ for all features."""
        return torch.linspace(-12, 6, 73, dtype=torch.float64)[:, None].expand(73, h)

    def hessian(self, hypers: Hypers) -> Float[Tensor, "d d"]:
        """Return ∂²L_T/∂w² = H + diag(c ∘ e^λ), which does not depend on w."""
        return self.gram + torch.diag(self._strength(hypers))

    def _strength(self, hypers: Hypers) -> Float[Tensor, " d"]:
        (name,) = self.penalized
        return self.weighting * hypers[name].to(self.gram).exp()
