"""What a bilevel problem is: a prediction, two objectives on top of it, a space of hyperparameters, and data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, Prediction
from bilevel.space import Space


class Problem(ABC):
    """min_λ L_V(λ, w*(λ)) subject to w*(λ) = argmin_w L_T(λ, w).

    `predict` stands apart from the objectives because solvers work on it: Δ-STN linearizes the prediction and keeps the
    convex objective and the penalties on w on top; Gauss-Newton products need the same split.
    """

    space: Space
    """The hyperparameters λ: domains, initial values, how they are perturbed."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Initial w and carry, on the CPU, drawn from `generator` alone."""

    @abstractmethod
    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Train, valid and test streams on `device`; `generator` (CPU) orders the batches."""

    @abstractmethod
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
        """f(λ, w; batch): pure, all that it changes is what it returns.

        `train` switches dropout and augmentation on; their masks come from `generator`, which may be None when `train` is
        False. A leaf of `hypers` is [*shape], or [B, *shape] when its hyperparameter is drawn per example.
        """

    @abstractmethod
    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """L_T as [], averaged over examples, convex in `prediction`; holds the penalties on w (`squared_norm`)."""

    @abstractmethod
    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """L_V as [], averaged over examples."""

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """What evaluation reports: values per item, averaged over all items of a split; a [] value stands for its batch.

        `loss` must be among them: it is what is minimized over λ, and what "best" means.
        """
        return {"loss": self.outer_objective(hypers, params, prediction, batch)}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """What follows from the means of `metrics` over a split and is no mean itself: perplexity = e^loss, say."""
        return {}

    def exact(self, hypers: Hypers) -> Metrics:
        """What a closed form knows of λ itself, [] each: `regret` = L_V(λ, w*(λ)) − L_V(λ*, w*(λ*)), say; {} for most."""
        return {}

    def exact_hypergradient(self, hypers: Hypers) -> Tensor | None:
        """dL_V(λ, w*(λ))/dλ where a closed form knows it, [h], in λ's own units and the order of u; None for most.

        Records then tell how near to it the solver's own is.
        """
        return None

    def pictures(self, hypers: Hypers, generator: torch.Generator) -> dict[str, Tensor]:
        """What λ does to the data, by name: [n, C, H, W] in [0, 1], of 1 or 3 channels, eight to a row; {} for most.

        Dashboards show them now and then; `generator` is on the device of λ, and in the same state at every call.
        """
        return {}

    def fresh_carry(self, carry: Carry, batch: Batch) -> Carry:
        """The carry with which a pass over another split begins at `batch`: statistics kept, recurrent state anew."""
        return carry

    def outer_carry(self, carry: Carry, last: Carry | None, batch: Batch) -> Carry:
        """The carry with which L_V of an outer batch begins; `last` is what the batch before it ended with, None at first.

        By default that of a pass over another split, `fresh_carry`; a problem whose batches continue each other goes on from
        `last`.
        """
        return self.fresh_carry(carry, batch)

    @final
    def inner_loss(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Carry]:
        """L_T(λ, w) on a batch: `inner_objective` ∘ `predict(train=True)`."""
        prediction, carry = self.predict(
            hypers, params, carry, batch, train=True, generator=generator
        )
        return self.inner_objective(hypers, params, prediction, batch), carry

    @final
    def outer_loss(
        self, hypers: Hypers, params: Params, carry: Carry, batch: Batch
    ) -> tuple[Tensor, Carry]:
        """L_V(λ, w) on a batch: `outer_objective` ∘ `predict(train=False)`."""
        prediction, carry = self.predict(hypers, params, carry, batch, train=False, generator=None)
        return self.outer_objective(hypers, params, prediction, batch), carry
