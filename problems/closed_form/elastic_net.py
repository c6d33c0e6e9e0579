"""The elastic net with a smoothed ℓ1 norm: a penalty that is not quadratic, and a best response known to rounding."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, BilevelError, Hypers, Params, Prediction, Real, Space, squared_norm
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.closed_form.linear_regression import Linear, squared_error

MOST_ITERATIONS = 100
"""Of Newton's method; it needs some 10, and 20 for a δ of 1e-8."""


@final
class ElasticNet(Linear):
    """Linear regression under a smoothed ℓ1 and an ℓ2 penalty, the weight of each tuned.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + e^{λ₁} Σ_j φ(w_j) + ½ e^{λ₂} ‖w‖²,    φ(w) = √(w² + δ²) − δ
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    φ is not |w|: it is rounded off over a width δ around zero, so that no weight is exactly zero. For that, w*(λ) is
    differentiable everywhere, where that of |w| has a kink whenever a weight enters or leaves; and plain gradient descent
    converges, at steps below 2/(‖H‖ + e^{λ₁}/δ + e^{λ₂}). As δ → 0 it is the elastic net.

    The hyperparameters `log_l1` and `log_l2` are [], perturbed per batch.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: the same for the final report.
        smoothing: δ.
        batch_size: None takes a whole split at every step.
        space: changes to the space, as in `Space.override`.

    Source: Zou & Hastie, JRSS B 2005, for the penalty; Chan, Golub & Mulet, SIAM J. Sci. Comput. 1999, for the solution.

    Example:
        >>> problem = ElasticNet.synthetic(features=5)
        >>> problem.best_response_jacobian({"log_l1": torch.tensor(-2.0), "log_l2": torch.tensor(-1.0)}).shape
        torch.Size([5, 2])

    Raises:
        BilevelError: δ is not above zero.
    """

    penalized = ("log_l1", "log_l2")

    def __init__(
        self,
        train: Split,
        valid: Split,
        test: Split | None = None,
        *,
        smoothing: float = 0.01,
        batch_size: int | None = None,
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not smoothing > 0:
            raise BilevelError(
                f"smoothing={smoothing} leaves the kink of |w|, where w*(λ) has no derivative; give a δ above 0"
            )
        super().__init__(train, valid, test, batch_size=batch_size)
        self.smoothing = smoothing
        # Per batch: φ is not quadratic in w, so that weights which vary per example would have to be formed.
        domain = Real(init=-2.0, per_example=False)
        self.space = Space(log_l1=domain, log_l2=domain).override(space or {})

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        rounded = (self._root(params["weight"]) - self.smoothing).sum()
        penalty = hypers["log_l1"].exp() * rounded + 0.5 * hypers["log_l2"].exp() * squared_norm(
            params
        )
        return squared_error(prediction, batch) + penalty.mean()

    def minimizer(self, hypers: Hypers) -> Tensor:
        """w*(λ) with ∇_w L_T = 0 to rounding, differentiable in λ.

        Raises:
            BilevelError: Newton's method stays above rounding, where the numbers of the data are too far apart.
        """
        w = self._solved({name: hypers[name].detach() for name in self.penalized})
        if torch.is_grad_enabled() and any(hypers[name].requires_grad for name in self.penalized):
            # From w*(λ₀), a constant, a step of Newton's method errs by |λ − λ₀|², two by its fourth power: three derivatives.
            for _ in range(2):
                w = w - torch.linalg.solve(self._hessian(hypers, w), self._gradient(hypers, w))
        return w

    def response_columns(self, hypers: Hypers, w: Tensor) -> dict[str, Tensor]:
        """−(∂²L_T/∂w²)⁻¹ [e^{λ₁} φ'(w*), e^{λ₂} w*]."""
        l1, l2 = self._strengths(hypers)
        columns = -torch.linalg.solve(
            self._hessian(hypers, w), torch.stack([l1 * w / self._root(w), l2 * w], dim=1)
        )
        return dict(zip(self.penalized, columns.split(1, dim=1), strict=True))

    def starts(self, h: int) -> Tensor:
        """A grid."""
        if h == 0:
            return torch.zeros(1, 0, dtype=torch.float64)
        return torch.cartesian_prod(*[torch.linspace(-10, 2, 13, dtype=torch.float64)] * h).reshape(
            -1, h
        )

    @torch.no_grad()
    def _solved(self, hypers: Hypers) -> Float[Tensor, " d"]:
        """w*(λ) by a primal-dual Newton method in w and s = φ'(w), linearizing s √(w² + δ²) = w.

        Newton's method in w alone takes φ' for constant and jumps from side to side of zero where δ is small.
        """
        l1, l2 = self._strengths(hypers)
        curvature = self.gram + l2 * torch.eye(len(self.gram), dtype=torch.float64)
        w, s = torch.linalg.solve(curvature, self.moment), torch.zeros_like(self.moment)
        least = (
            1e-14 * (curvature.abs() @ w.abs() + self.moment.abs() + l1).max()
        )  # of what the gradient is a difference of
        for _ in range(MOST_ITERATIONS):
            root = self._root(w)
            sign = w / root
            gradient = curvature @ w - self.moment + l1 * sign
            if gradient.abs().max() <= least:
                return w
            slope = (1 - s * sign) / root
            step = -torch.linalg.solve(curvature + torch.diag(l1 * slope), gradient)
            turn = slope * step + sign - s
            room = torch.where(turn > 0, 1 - s, 1 + s) / turn.abs().clamp_min(1e-300)
            w, s = (
                w + step,
                s + 0.95 * room.min().clamp(max=1 / 0.95) * turn,
            )  # |s| < 1: every curvature stays positive
        at = ", ".join(f"{name}={float(hypers[name]):.4g}" for name in self.penalized)
        raise BilevelError(
            f"the best response at {at} could not be found to rounding: ∂L_T/∂w stays at {float(gradient.abs().max()):.1e}; "
            "scale the features to similar sizes, or take a larger smoothing"
        )

    def _gradient(self, hypers: Hypers, w: Tensor) -> Tensor:
        l1, l2 = self._strengths(hypers)
        return self.gram @ w - self.moment + l1 * w / self._root(w) + l2 * w

    def _hessian(self, hypers: Hypers, w: Tensor) -> Tensor:
        l1, l2 = self._strengths(hypers)
        return self.gram + torch.diag(l1 * self.smoothing**2 / self._root(w) ** 3 + l2)

    def _root(self, w: Tensor) -> Tensor:
        return (w.square() + self.smoothing**2).sqrt()

    def _strengths(self, hypers: Hypers) -> tuple[Tensor, Tensor]:
        return hypers["log_l1"].to(self.gram).exp(), hypers["log_l2"].to(self.gram).exp()
