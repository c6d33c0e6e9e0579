"""Ridge regression: the decay enters non-linearly, and the best response is still known."""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilevel import (
    Batch,
    BilevelError,
    Carry,
    Data,
    Hypers,
    Params,
    Prediction,
    Problem,
    Real,
    Space,
    squared_norm,
    streams,
)

Split = tuple[Tensor, Tensor]


@final
class Ridge(Problem):
    """Linear regression with a tuned weight decay, one for all weights or one per feature.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + ½ Σ_j e^{λ_j} w_j²
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    The hyperparameter `log_decay` is [] or [d]; the weight `weight` is [1, d], as in `nn.Linear`. Closed forms are float64.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: the same for the final report.
        per_feature: one decay per feature, perturbed per batch.
        batch_size: None takes a whole split at every step.
        space: changes to the space, as in `Space.override`.

    Attributes:
        gram: H = XᵀX/n, [d, d] in float64.
        moment: b = Xᵀy/n, [d] in float64.

    Example:
        >>> problem = Ridge.synthetic(features=5, condition=10.0)
        >>> problem.hypergradient(problem.optimum()).abs().max().item() < 1e-10
        True
    """

    def __init__(
        self,
        train: Split,
        valid: Split,
        test: Split | None = None,
        *,
        per_feature: bool = False,
        batch_size: int | None = None,
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.per_feature, self.batch_size = per_feature, batch_size
        self._splits = (train, valid, test)
        self._valid = (valid[0].double(), valid[1].double())
        X, y = train[0].double(), train[1].double()
        self.gram, self.moment = X.T @ X / len(X), X.T @ y / len(X)
        decay = Real(init=0.0, shape=(X.shape[1],), per_example=False) if per_feature else Real(init=0.0)
        self.space = Space(log_decay=decay).override(space or {})

    @classmethod
    def synthetic(
        cls,
        examples: int = 60,
        features: int = 10,
        condition: float = 10.0,
        noise: float = 1.0,
        data_seed: int = 0,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "Ridge":
        """Y = Xw + `noise` · N(0, 1), with `examples` rows in each split.

        The eigenvalues of XᵀX/n on the training split are spread evenly in logarithm from 1 down to 1/`condition`, exactly.
        """
        if examples < features:
            raise BilevelError(f"{examples} examples span no {features} features; give at least {features} examples")
        generator = torch.Generator().manual_seed(data_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rotation = torch.linalg.qr(normal(features, features))[0]
        root = torch.logspace(0, -0.5, features, base=condition, dtype=torch.float64)[:, None] * rotation
        true = normal(features)
        white = torch.linalg.qr(normal(examples, features))[0] * math.sqrt(examples)
        inputs = [z @ root for z in (white, normal(examples, features), normal(examples, features))]
        to = dtype or torch.get_default_dtype()
        splits = [(X.to(to), (X @ true + noise * normal(examples)).to(to)) for X in inputs]
        return cls(*splits, **options)

    @classmethod
    def diabetes(cls, data_seed: int = 1, *, dtype: torch.dtype | None = None, **options: Any) -> "Ridge":
        """scikit-learn's diabetes data, 442 patients with 10 features: split 60/20/20, standardized by the training split.

        With `data_seed` 0, 2 or 3 validation prefers no decay at all, and there is no λ*.
        """
        from sklearn.datasets import load_diabetes

        X, y = (torch.from_numpy(a).double() for a in load_diabetes(return_X_y=True))
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(data_seed))
        rows = order.tensor_split([int(0.6 * len(X)), int(0.8 * len(X))])
        X, y = ((a - a[rows[0]].mean(0)) / a[rows[0]].std(0) for a in (X, y))
        to = dtype or torch.get_default_dtype()
        return cls(*((X[i].to(to), y[i].to(to)) for i in rows), **options)

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        X = self._splits[0][0]
        return {"weight": torch.randn((1, X.shape[1]), generator=generator, dtype=X.dtype) / math.sqrt(X.shape[1])}, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        return streams(*self._splits, batch_size=self.batch_size, device=device, generator=generator)

    def predict(
        self, hypers: Hypers, params: Params, carry: Carry, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[Prediction, Carry]:
        return F.linear(batch[0], params["weight"]).squeeze(-1), carry

    def inner_objective(self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch) -> Tensor:
        decay = hypers["log_decay"].exp()
        penalty = (decay * params["weight"] ** 2).sum(-1) if self.per_feature else decay * squared_norm(params)
        return 0.5 * F.mse_loss(prediction, batch[1]) + 0.5 * penalty.mean()

    def outer_objective(self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch) -> Tensor:
        return 0.5 * F.mse_loss(prediction, batch[1])

    def best_response(self, hypers: Hypers) -> Params:
        """w*(λ) = (H + diag e^λ)⁻¹ b, differentiable in λ."""
        return {"weight": torch.linalg.solve(self._hessian(hypers), self.moment)[None]}

    def best_response_jacobian(self, hypers: Hypers) -> Float[Tensor, "d h"]:
        """∂w*/∂λ = −(H + diag e^λ)⁻¹ diag(e^λ ∘ w*); with one λ for all, the sum of its columns."""
        response = torch.diag(self._decay(hypers) * self.best_response(hypers)["weight"][0])
        jacobian = -torch.linalg.solve(self._hessian(hypers), response)
        return jacobian if self.per_feature else jacobian.sum(1, keepdim=True)

    def hypergradient(self, hypers: Hypers) -> Float[Tensor, " h"]:
        """dL_V(w*(λ))/dλ = (∂w*/∂λ)ᵀ X_vᵀ(X_v w* − y_v)/n_v."""
        X, y = self._valid
        residual = X @ self.best_response(hypers)["weight"][0] - y
        return self.best_response_jacobian(hypers).T @ (X.T @ residual) / len(X)

    def optimum(self) -> Hypers:
        """λ* with a hypergradient below 1e-10: Newton's method from the best λ common to all features.

        Raises:
            BilevelError: some λ_j runs off to infinity, where validation prefers a feature without any decay, or without it.
        """
        X, y = self._valid

        def loss(u: Tensor) -> Tensor:
            return 0.5 * F.mse_loss(X @ self.best_response(self.space.constrain(u))["weight"][0], y)

        starts = torch.linspace(-12, 6, 73, dtype=torch.float64)
        u = min((torch.full((self.space.numel,), float(start), dtype=torch.float64) for start in starts), key=loss)
        for _ in range(200):
            gradient = self.hypergradient(self.space.constrain(u))
            if gradient.abs().max() < 1e-13 or u.abs().max() > 20:
                break
            eigenvalues, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, u))
            step = -vectors @ (vectors.T @ gradient / eigenvalues.abs().clamp_min(1e-8))
            step = step / max(1.0, float(step.abs().max()))
            while loss(u + step) > loss(u) and step.abs().max() > 1e-9:
                step = step / 2
            u = u + step
        if u.abs().max() > 20 or gradient.abs().max() > 1e-10:
            raise BilevelError(
                "validation is best at no decay, or an infinite one, of some feature: there is no λ*; use other data"
            )
        return self.space.constrain(u)

    def _decay(self, hypers: Hypers) -> Tensor:
        return hypers["log_decay"].to(self.gram).exp().expand(len(self.gram))

    def _hessian(self, hypers: Hypers) -> Tensor:
        return self.gram + torch.diag(self._decay(hypers))
