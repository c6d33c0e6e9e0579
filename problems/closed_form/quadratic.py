"""The joint quadratic: every quantity of a bilevel problem in closed form."""

from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import (
    Batch,
    Carry,
    Data,
    FullBatch,
    Hypers,
    Metrics,
    Params,
    Prediction,
    Problem,
    Real,
    Space,
)
from bilevel.problems.dtypes import DType, floating
from bilevel.problems.space_checks import SpaceChanges

COEFFICIENTS = ("A", "B", "C", "d", "e", "M", "w_bar", "P", "lambda_bar")


@final
class Quadratic(Problem):
    """A problem whose objectives are quadratic in (w, λ); the prediction is w itself.

        L_T(λ, w) = ½ [w; λ]ᵀ [[A, B], [Bᵀ, C]] [w; λ] + dᵀw + eᵀλ
        L_V(λ, w) = ½ (w − w̄)ᵀ M (w − w̄) + ½ (λ − λ̄)ᵀ P (λ − λ̄)

    There is one real hyperparameter `hyper` [h], perturbed per batch, and one weight `w` [m]. By
    default P = 0 and λ̄ = 0, so λ acts through w only. Closed forms have the type and the device of
    the coefficients; `exact` is float64 on the CPU.

    Args:
        A: [m, m], symmetric positive definite.
        B: [m, h].
        C: [h, h].
        d: [m].
        e: [h].
        M: [m, m], symmetric positive definite.
        w_bar: [m].
        P: [h, h].
        lambda_bar: [h].
        space: changes of the space, as in `Space.override`.

    Example:
        >>> problem = Quadratic.random(weights=4, hypers=2, seed=0, dtype=torch.float64)
        >>> problem.hypergradient(problem.optimum()).abs().max().item() < 1e-12
        True
    """

    def __init__(
        self,
        A: Float[Tensor, "m m"],
        B: Float[Tensor, "m h"],
        C: Float[Tensor, "h h"],
        d: Float[Tensor, " m"],
        e: Float[Tensor, " h"],
        M: Float[Tensor, "m m"],
        w_bar: Float[Tensor, " m"],
        P: Float[Tensor, "h h"] | None = None,
        lambda_bar: Float[Tensor, " h"] | None = None,
        *,
        space: SpaceChanges | None = None,
    ) -> None:
        self.A = A
        self.B = B
        self.C = C
        self.d = d
        self.e = e
        self.M = M
        self.w_bar = w_bar
        self.P = torch.zeros_like(C) if P is None else P
        self.lambda_bar = torch.zeros_like(e) if lambda_bar is None else lambda_bar
        hyper = Real(init=0.0, shape=(B.shape[1],), per_example=False)
        self.space = Space(hyper=hyper).override(space or {})

    @classmethod
    def random(
        cls,
        weights: int = 10,
        hypers: int = 3,
        condition: float = 10.0,
        seed: int = 0,
        *,
        direct: float = 0.0,
        dtype: DType = None,
        space: SpaceChanges | None = None,
    ) -> "Quadratic":
        """Draw a problem with C = I and P = `direct` · I.

        The eigenvalues of A are log-evenly spaced from 1 down to 1/`condition`.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        Q, R = torch.linalg.qr(normal(weights, weights))[0], normal(weights, weights)
        identity = torch.eye(hypers, dtype=torch.float64)
        coefficients = (
            Q * torch.logspace(0, -1, weights, base=condition, dtype=torch.float64) @ Q.T,
            normal(weights, hypers) / weights**0.5,
            identity,
            normal(weights),
            normal(hypers),
            R @ R.T / weights + torch.eye(weights, dtype=torch.float64),
            normal(weights),
            direct * identity,
            normal(hypers),
        )
        return cls(*(c.to(floating(dtype)) for c in coefficients), space=space)

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        return {"w": torch.randn(len(self.d), generator=generator, dtype=self.d.dtype)}, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Return the coefficients as a batch of one example on `device`."""
        batch = {name: getattr(self, name)[None] for name in COEFFICIENTS}
        return Data(FullBatch(batch, device=device), FullBatch(batch, device=device))

    def predict(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        *,
        train: bool,
        generator: torch.Generator | None,
    ) -> tuple[Prediction, Carry]:
        return params["w"], carry

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        A, B, C, d, e = (batch[name][0] for name in ("A", "B", "C", "d", "e"))
        w, λ = prediction, hypers["hyper"].to(A)
        return 0.5 * w @ A @ w + w @ B @ λ + 0.5 * λ @ C @ λ + d @ w + e @ λ

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        M, w_bar, P, lambda_bar = (batch[name][0] for name in ("M", "w_bar", "P", "lambda_bar"))
        w, λ = prediction - w_bar, hypers["hyper"].to(M) - lambda_bar
        return 0.5 * w @ M @ w + 0.5 * λ @ P @ λ

    def best_response(self, hypers: Hypers) -> Params:
        """Return w*(λ) = −A⁻¹(Bλ + d)."""
        return {"w": -torch.linalg.solve(self.A, self.B @ hypers["hyper"].to(self.A) + self.d)}

    def best_response_jacobian(self) -> Float[Tensor, "m h"]:
        """Return ∂w*/∂λ = −A⁻¹B, which does not depend on λ."""
        return -torch.linalg.solve(self.A, self.B)

    def hypergradient(self, hypers: Hypers) -> Float[Tensor, " h"]:
        """Return dL_V(λ, w*(λ))/dλ = (∂w*/∂λ)ᵀ M (w* − w̄) + P (λ − λ̄)."""
        J = self.best_response_jacobian()
        w = self.best_response(hypers)["w"]
        λ = hypers["hyper"].to(self.A)
        return J.T @ self.M @ (w - self.w_bar) + self.P @ (λ - self.lambda_bar)

    def optimum(self) -> Hypers:
        """Return λ* = (JᵀMJ + P)⁺ (JᵀM(w̄ + A⁻¹d) + Pλ̄) with J = ∂w*/∂λ.

        If there are several, the result has the least norm. A frozen λ is returned unchanged.
        """
        if self.space["hyper"].frozen:
            return {"hyper": self.space["hyper"].initial().to(self.A)}
        J = self.best_response_jacobian()
        wanted = self.w_bar + torch.linalg.solve(self.A, self.d)
        curvature = torch.linalg.pinv(J.T @ self.M @ J + self.P, hermitian=True)
        return {"hyper": curvature @ (J.T @ self.M @ wanted + self.P @ self.lambda_bar)}

    def exact(self, hypers: Hypers) -> Metrics:
        """Return `regret` and `hypergradient_norm`.

            regret = L_V(λ, w*(λ)) − L_V(λ*, w*(λ*)),    hypergradient_norm = ‖dL_V(λ, w*(λ))/dλ‖

        Both are zero if λ is frozen.
        """
        with torch.no_grad():
            if self.space["hyper"].frozen:
                return dict.fromkeys(
                    ("regret", "hypergradient_norm"), torch.zeros((), dtype=torch.float64)
                )
            own = {"hyper": hypers["hyper"].to("cpu", torch.float64)}
            return {
                "regret": self._twin.best_loss(own) - self._least,
                "hypergradient_norm": self._twin.hypergradient(own).norm(),
            }

    def exact_hypergradient(self, hypers: Hypers) -> Tensor | None:
        """Return `hypergradient` in float64 on the CPU, or None if λ is frozen."""
        if self.space["hyper"].frozen:
            return None
        with torch.no_grad():
            return self._twin.hypergradient({"hyper": hypers["hyper"].to("cpu", torch.float64)})

    def best_loss(self, hypers: Hypers) -> Float[Tensor, ""]:
        """Return L_V(λ, w*(λ))."""
        w = self.best_response(hypers)["w"] - self.w_bar
        λ = hypers["hyper"].to(self.A) - self.lambda_bar
        return 0.5 * w @ self.M @ w + 0.5 * λ @ self.P @ λ

    @cached_property
    def _twin(self) -> "Quadratic":
        """Return the same problem in float64 on the CPU."""
        return Quadratic(*(getattr(self, name).to("cpu", torch.float64) for name in COEFFICIENTS))

    @cached_property
    def _least(self) -> Tensor:
        """Return L_V(λ*, w*(λ*))."""
        return self._twin.best_loss(self._twin.optimum())
