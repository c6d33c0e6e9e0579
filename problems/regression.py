"""Ridge regression: the decay enters non-linearly, and the best response is still known."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel import Hypers, Params, Real, Space, squared_norm
from problems.linear import Linear
from problems.linear_data import Split


@final
class Ridge(Linear):
    """Linear regression with a tuned weight decay, one for all weights or one per feature.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + ½ Σ_j e^{λ_j} w_j²
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    The hyperparameter `log_decay` is [] or [d]. On diabetes with `data_seed` 0, 2 or 3, validation prefers no decay at all, and
    there is no λ*.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: the same for the final report.
        per_feature: one decay per feature, perturbed per batch.
        batch_size: None takes a whole split at every step.
        space: changes to the space, as in `Space.override`.

    Example:
        >>> problem = Ridge.synthetic(features=5, condition=10.0)
        >>> problem.hypergradient(problem.optimum()).abs().max().item() < 1e-10
        True
    """

    penalized = ("log_decay",)

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
        super().__init__(train, valid, test, batch_size=batch_size)
        self.per_feature = per_feature
        decay = Real(init=0.0, shape=(len(self.moment),), per_example=False) if per_feature else Real(init=0.0)
        self.space = Space(log_decay=decay).override(space or {})

    def penalty(self, hypers: Hypers, params: Params) -> Tensor:
        decay = hypers["log_decay"].exp()
        return 0.5 * (squared_norm(params, decay) if self.per_feature else decay * squared_norm(params))

    def best_response(self, hypers: Hypers) -> Params:
        """w*(λ) = (H + diag e^λ)⁻¹ b, differentiable in λ."""
        return {"weight": torch.linalg.solve(self._hessian(hypers), self.moment)[None]}

    def response_columns(self, hypers: Hypers, w: Tensor) -> dict[str, Tensor]:
        """−(H + diag e^λ)⁻¹ diag(e^λ ∘ w*); with one λ for all, the sum of its columns."""
        mixed = torch.diag(self._decay(hypers) * w)
        return {"log_decay": -torch.linalg.solve(self._hessian(hypers), mixed if self.per_feature else mixed.sum(1, True))}

    def starts(self, h: int) -> Tensor:
        """The same λ for all features."""
        return torch.linspace(-12, 6, 73, dtype=torch.float64)[:, None].expand(73, h)

    def _decay(self, hypers: Hypers) -> Tensor:
        return hypers["log_decay"].to(self.gram).exp().expand(len(self.gram))

    def _hessian(self, hypers: Hypers) -> Tensor:
        return self.gram + torch.diag(self._decay(hypers))
