"""Linear regression with input dropout, sampled or as its expected penalty in closed form."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Carry, Hypers, Params, Prediction, Real, Space, squared_norm
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.closed_form.linear_regression import squared_error
from bilevel.problems.space_checks import SpaceChanges


@final
class InputDropout(GeneralizedRidge):
    """Linear regression with input dropout at a tuned rate p, for all features or per feature.

        L_T(λ, w) = E_m 1/(2n) Σ_i (wᵀ(x_i ∘ m_i) − y_i)²
                  = 1/(2n) ‖Xw − y‖² + ½ Σ_j p_j/(1 − p_j) H_jj w_j²
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    with m_ij = Bernoulli(1 − p_j)/(1 − p_j). The hyperparameter `logit_rate` is λ = log p/(1 − p),
    [] or [d]. So the penalty is ½ Σ_j e^{λ_j} H_jj w_j²: weight decay that scales with the feature.
    Masks are drawn at every step and have no derivative in λ. With `expected`, L_T is the closed
    form, computed from the second moments of each batch.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: X and y of the test split, or None.
        expected: whether L_T is the expectation over masks; otherwise masks are drawn.
        per_feature: one rate per feature; perturbed per batch if `expected`.
        batch_size: number of examples in a batch; None takes a whole split.
        space: changes of the space, as in `Space.override`.

    Source: Srivastava et al., JMLR 2014, section 9.1; Wager, Wang & Liang, NeurIPS 2013.

    Example:
        >>> problems = InputDropout.synthetic(expected=True), InputDropout.synthetic()
        >>> [problem.space["logit_rate"].differentiable for problem in problems]
        [True, False]
    """

    penalized = ("logit_rate",)

    def __init__(
        self,
        train: Split,
        valid: Split,
        test: Split | None = None,
        *,
        expected: bool = False,
        per_feature: bool = False,
        batch_size: int | None = None,
        space: SpaceChanges | None = None,
    ) -> None:
        super().__init__(train, valid, test, batch_size=batch_size)
        self.expected = expected
        self.per_feature = per_feature
        self.weighting = self.gram.diagonal()
        rate = Real(
            init=-1.0,
            shape=(len(self.moment),) if per_feature else (),
            differentiable=expected,
            per_example=not (expected and per_feature),
        )
        self.space = Space(logit_rate=rate).override(space or {})

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
        X = batch[0]
        if train and not self.expected:
            X = X * self._mask(hypers["logit_rate"].detach(), X, generator)
        return F.linear(X, params["weight"]).squeeze(-1), carry

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        fit = squared_error(prediction, batch)
        if not self.expected:
            return fit
        odds = hypers["logit_rate"].exp()  # e^λ = p/(1 − p)
        moments = batch[0].square().mean(0)
        norm = (
            squared_norm(params, odds * moments)
            if self.per_feature
            else odds * squared_norm(params, moments)
        )
        return fit + 0.5 * norm.mean()

    def _mask(
        self, logit: Tensor, X: Float[Tensor, "n d"], generator: torch.Generator | None
    ) -> Float[Tensor, "n d"]:
        """Draw Bernoulli(1 − p)/(1 − p) at the logit of p, [] or [n]; per feature [d] or [n, d]."""
        keep = torch.sigmoid(-logit if self.per_feature else -logit[..., None]).to(X)
        draws = torch.rand(X.shape, generator=generator, device=X.device, dtype=X.dtype)
        return (draws < keep) / keep
