"""The elastic net with a smoothed ℓ1 norm, and its best response to machine precision."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, BilevelError, Hypers, Params, Prediction, Real, Space, squared_norm
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.closed_form.linear_regression import Linear, squared_error
from bilevel.problems.space_checks import SpaceChanges
from bilevel.validate import positive

MOST_ITERATIONS = 100
"""Limit for Newton's method, which needs about 10 iterations, and 20 for δ = 1e-8."""


@final
class ElasticNet(Linear):
    """Linear regression with tuned weights of a smoothed ℓ1 penalty and of an ℓ2 penalty.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + e^{λ₁} Σ_j φ(w_j) + ½ e^{λ₂} ‖w‖²,    φ(w) = √(w² + δ²) − δ
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    φ rounds the kink of |w| off over a width δ around zero, so no weight is exactly zero. In
    return, w*(λ) is differentiable everywhere; with |w| it has a kink whenever a weight becomes
    zero or nonzero. Plain gradient descent converges with steps below
    2/(‖H‖ + e^{λ₁}/δ + e^{λ₂}). As δ → 0 this is the elastic net.

    The hyperparameters `log_l1` and `log_l2` are [], perturbed per batch.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: X and y of the test split, or None.
        smoothing: δ.
        batch_size: number of examples in a batch; None takes a whole split.
        space: changes of the space, as in `Space.override`.

    Source: Zou & Hastie, JRSS B 2005, for the penalty; Chan, Golub & Mulet, SIAM J. Sci. Comput.
    1999, for the solution.

    Example:
        >>> problem = ElasticNet.synthetic(features=5)
        >>> hypers = {"log_l1": torch.tensor(-2.0), "log_l2": torch.tensor(-1.0)}
        >>> problem.best_response_jacobian(hypers).shape
        torch.Size([5, 2])

    Raises:
        BilevelError: δ is not positive.
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
        space: SpaceChanges | None = None,
    ) -> None:
        positive("choose a number above 0; at 0, w*(λ) has kinks", smoothing=smoothing)
        super().__init__(train, valid, test, batch_size=batch_size)
        self.smoothing = smoothing
        # φ is not quadratic in w, so per-example weights would have to be formed.
        domain = Real(init=-2.0, per_example=False)
        self.space = Space(log_l1=domain, log_l2=domain).override(space or {})

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        rounded = (self._root(params["weight"]) - self.smoothing).sum()
        l1, l2 = hypers["log_l1"].exp(), hypers["log_l2"].exp()
        penalty = l1 * rounded + 0.5 * l2 * squared_norm(params)
        return squared_error(prediction, batch) + penalty.mean()

    def minimizer(self, hypers: Hypers) -> Tensor:
        """Return w*(λ) with ∇_w L_T = 0 to machine precision, differentiable in λ.

        Raises:
            BilevelError: Newton's method does not reach machine precision, because the features
                have very different sizes.
        """
        w = self._solved({name: hypers[name].detach() for name in self.penalized})
        if torch.is_grad_enabled() and any(hypers[name].requires_grad for name in self.penalized):
            # From the constant w*(λ₀), one Newton step has an error of |λ − λ₀|², and two steps of
            # |λ − λ₀|⁴: three derivatives are right.
            for _ in range(2):
                w = w - torch.linalg.solve(self._hessian(hypers, w), self._gradient(hypers, w))
        return w

    def response_columns(self, hypers: Hypers, w: Tensor) -> dict[str, Tensor]:
        """Return −(∂²L_T/∂w²)⁻¹ [e^{λ₁} φ'(w*), e^{λ₂} w*]."""
        l1, l2 = self._strengths(hypers)
        columns = -torch.linalg.solve(
            self._hessian(hypers, w), torch.stack([l1 * w / self._root(w), l2 * w], dim=1)
        )
        return dict(zip(self.penalized, columns.split(1, dim=1), strict=True))

    def starts(self, h: int) -> Tensor:
        """Return a grid."""
        if h == 0:
            return torch.zeros(1, 0, dtype=torch.float64)
        axis = torch.linspace(-10, 2, 13, dtype=torch.float64)
        return torch.cartesian_prod(*[axis] * h).reshape(-1, h)

    @torch.no_grad()
    def _solved(self, hypers: Hypers) -> Float[Tensor, " d"]:
        """Return w*(λ) by a primal-dual Newton method in w and s = φ'(w).

        It linearizes s √(w² + δ²) = w. For a small δ, Newton's method in w alone jumps between the
        sides of zero, because it takes φ' as constant.
        """
        l1, l2 = self._strengths(hypers)
        curvature = self.gram + l2 * torch.eye(len(self.gram), dtype=torch.float64)
        w, s = torch.linalg.solve(curvature, self.moment), torch.zeros_like(self.moment)
        # Relative to the terms whose difference is the gradient.
        least = 1e-14 * (curvature.abs() @ w.abs() + self.moment.abs() + l1).max()
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
            w = w + step
            s = s + 0.95 * room.min().clamp(max=1 / 0.95) * turn  # |s| < 1: curvatures are positive
        at = ", ".join(f"{name}={float(hypers[name]):.4g}" for name in self.penalized)
        raise BilevelError(
            f"the best response at {at} is not exact, because ∂L_T/∂w stays at "
            f"{float(gradient.abs().max()):.1e}; scale the features to similar sizes, or choose a "
            "larger smoothing"
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
