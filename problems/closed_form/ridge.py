"""Ridge regression: the weight decay enters non-linearly, and the best response is known."""

from typing import final

import torch
from torch import Tensor

from bilevel import Batch, Hypers, Params, Prediction, Real, Space, squared_norm
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.closed_form.linear_regression import squared_error
from bilevel.problems.space_checks import SpaceChanges


@final
class Ridge(GeneralizedRidge):
    """Linear regression with a tuned weight decay, for all weights or per feature.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + ½ Σ_j e^{λ_j} w_j²
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    The hyperparameter `log_decay` is [] or [d]. On diabetes with `data_seed` 0, 2 or 3 there is no
    λ*, because validation prefers no weight decay at all.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: X and y of the test split, or None.
        per_feature: one weight decay per feature, perturbed per batch.
        batch_size: number of examples in a batch; None takes a whole split.
        space: changes of the space, as in `Space.override`.

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
        space: SpaceChanges | None = None,
    ) -> None:
        super().__init__(train, valid, test, batch_size=batch_size)
        self.per_feature = per_feature
        self.weighting = torch.ones_like(self.moment)
        decay = (
            Real(init=0.0, shape=(len(self.moment),), per_example=False)
            if per_feature
            else Real(init=0.0)
        )
        self.space = Space(log_decay=decay).override(space or {})

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        decay = hypers["log_decay"].exp()
        penalty = squared_norm(params, decay) if self.per_feature else decay * squared_norm(params)
        return squared_error(prediction, batch) + 0.5 * penalty.mean()
