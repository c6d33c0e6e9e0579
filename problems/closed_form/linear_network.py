"""A linear network with an input-gradient penalty: its best linear map is unique and known."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import Batch, Carry, Hypers, Params, Prediction, Real, Space
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.closed_form.linear_regression import squared_error
from bilevel.problems.networks.building_blocks import check_widths
from bilevel.problems.space_checks import SpaceChanges


@final
class LinearNetwork(GeneralizedRidge):
    """A linear network f(x) = W_L ⋯ W_1 x with a tuned penalty on the norm of its Jacobian ∂f/∂x.

        L_T(λ, W) = ½ mean (f(x) − y)² + ½ e^λ mean ‖∂f/∂x‖²
        L_V(W)    = ½ mean (f(x) − y)²

    ∂f/∂x = (W_L ⋯ W_1)ᵀ = w is the same for every x, so in the linear map w this is ridge
    regression. The factors are not unique: (W_2 M⁻¹, M W_1) is as good as (W_2, W_1). So the
    Hessian in W is singular, and ∂W*/∂λ is undefined. The closed forms describe the map
    `linear_map(params)`, its best response and its Jacobian. L_V and the hypergradient depend on
    the map only.

    The hyperparameter `log_penalty` is []. The prediction is {"output": f(x) [n], "gradient": ∂f/∂x
    [n, d]}. L_T is convex in it, so the penalty is linearized together with the network.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: X and y of the test split, or None.
        hidden: widths of the hidden layers.
        batch_size: number of examples in a batch; None takes a whole split.
        space: changes of the space, as in `Space.override`.

    Source: MacKay et al., ICLR 2019, section 3.2, for the two-layer network; Drucker & Le Cun, IEEE
    TNN 1992, for the penalty.

    Example:
        >>> problem = LinearNetwork.synthetic(features=5, hidden=[4, 3])
        >>> best = problem.best_response({"log_penalty": torch.tensor(-1.0)})
        >>> [tuple(W.shape) for W in best.values()], problem.linear_map(best).shape
        ([(4, 5), (3, 4), (1, 3)], torch.Size([5]))
    """

    penalized = ("log_penalty",)

    def __init__(
        self,
        train: Split,
        valid: Split,
        test: Split | None = None,
        *,
        hidden: Sequence[int] = (10,),
        batch_size: int | None = None,
        space: SpaceChanges | None = None,
    ) -> None:
        super().__init__(train, valid, test, batch_size=batch_size)
        check_widths(hidden=hidden)
        self.sizes = (len(self.moment), *hidden, 1)
        self.weighting = torch.ones_like(self.moment)
        self.space = Space(log_penalty=Real(init=0.0)).override(space or {})

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Draw weights with entries N(0, 1/fan_in)."""
        dtype = self._splits[0][0].dtype
        params = {
            f"layers.{i}.weight": torch.randn((out, fan_in), generator=generator, dtype=dtype)
            / math.sqrt(fan_in)
            for i, (fan_in, out) in enumerate(pairwise(self.sizes))
        }
        return params, {}

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
        output, gradient = batch[0], batch[0].new_ones(len(batch[0]), 1)
        for W in params.values():
            output = F.linear(output, W)
        for W in reversed(params.values()):
            gradient = F.linear(gradient, W.t())
        return {"output": output.squeeze(-1), "gradient": gradient}, carry

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        penalty = hypers["log_penalty"].exp() * prediction["gradient"].square().sum(-1)
        return squared_error(prediction["output"], batch) + 0.5 * penalty.mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return squared_error(prediction["output"], batch)

    def linear_map(self, params: Params) -> Tensor:
        """Return w = (W_L ⋯ W_1)ᵀ."""
        return reduce(lambda product, W: W @ product, params.values())[0]

    def best_response(self, hypers: Hypers) -> Params:
        """Return the balanced minimizer, whose factors all have rank one and norm ‖w*‖^{1/L}."""
        w = self.minimizer(hypers)
        norm, factors = w.norm(), {}
        for i, (fan_in, out) in enumerate(pairwise(self.sizes)):
            row = w / norm if i == 0 else F.one_hot(torch.tensor(0), fan_in).to(w)
            column = F.one_hot(torch.tensor(0), out).to(w)
            factors[f"layers.{i}.weight"] = norm ** (1 / (len(self.sizes) - 1)) * torch.outer(
                column, row
            )
        return factors
