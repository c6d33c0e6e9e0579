"""The interface of a bilevel problem: prediction, two objectives, hyperparameters and data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.metrics import Reported
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, Prediction
from bilevel.space import Space


class Problem(ABC):
    """A bilevel problem: min_λ L_V(λ, w*(λ)) subject to w*(λ) = argmin_w L_T(λ, w).

    `predict` is separate from the objectives because solvers work on it. Δ-STN linearizes the
    prediction and keeps the convex objective and the penalties on w on top. Gauss–Newton products
    need the same separation.
    """

    space: Space
    """The hyperparameters λ: domains, initial values and perturbations."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Return the initial w and carry on the CPU, drawn from `generator` alone."""

    @abstractmethod
    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        """Return the train, valid and test streams on `device`.

        `generator` (CPU) orders the batches.
        """

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
        """Return f(λ, w; batch) and the next carry.

        The function is pure: it returns everything that it changes. `train` switches dropout and
        augmentation on; their draws come from `generator`, which may be None when `train` is False.
        A leaf of `hypers` is [*shape], or [B, *shape] when its hyperparameter is drawn per example.
        """

    @abstractmethod
    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """Return L_T, [], averaged over examples.

        It is convex in `prediction` and holds the penalties on w (`squared_norm`).
        """

    @abstractmethod
    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """Return L_V, [], averaged over examples."""

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Reported:
        """Return the values that an evaluation averages over the items of a split.

        A value has one entry per item; a value of shape [] stands for all examples of its batch.
        `Weighted(value, weight)` has a weight of its own. None is left out. `loss` must be among
        them: λ minimizes it, and it selects the best evaluation.
        """
        return {"loss": self.outer_objective(hypers, params, prediction, batch)}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return metrics that follow from the means of `metrics` and are not means themselves.

        Perplexity = e^loss is an example.
        """
        return {}

    def exact(self, hypers: Hypers) -> Metrics:
        """Return quantities at λ from a closed form, [] each; {} without a closed form.

        `regret` = L_V(λ, w*(λ)) − L_V(λ*, w*(λ*)) is an example.
        """
        return {}

    def exact_hypergradient(self, hypers: Hypers) -> Tensor | None:
        """Return dL_V(λ, w*(λ))/dλ from a closed form, [h]; None without one.

        It is in the units of λ and the order of u. Records then compare the solver's hypergradient
        with it.
        """
        return None

    def pictures(self, hypers: Hypers, generator: torch.Generator) -> dict[str, Tensor]:
        """Return images of the effect of λ on the data, by name; {} without any.

        Each entry is [n, C, H, W] in [0, 1] with 1 or 3 channels; dashboards show eight in a row.
        `generator` is on the device of λ and has the same state at every call.
        """
        return {}

    def fresh_carry(self, carry: Carry, batch: Batch) -> Carry:
        """Return the carry with which a pass over another split begins at `batch`.

        Statistics are kept, and recurrent state starts anew.
        """
        return carry

    def outer_carry(self, carry: Carry, last: Carry | None, batch: Batch) -> Carry:
        """Return the carry with which L_V of an outer batch begins.

        `last` is the carry after the previous outer batch, None for the first one. The default is
        `fresh_carry`. A problem whose batches continue each other continues from `last`.
        """
        return self.fresh_carry(carry, batch)

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        """Return the entries of the carry that follow w, as functions of λ and w; {} for none.

        Training keeps statistics that L_V reads, for example a moving average c ← (1 − m) c + m s.
        They follow w, so their change is a part of dL_V/dλ. An entry is s(λ, w), the value that
        `batch`, a training batch, pulls it to. The hypergradient takes the derivative of s, and L_V
        keeps the value of the carry. Statistics without an entry are constants of λ. Draws of
        training come from `generator`.
        """
        return {}

    @final
    def inner_loss(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Carry]:
        """Return L_T(λ, w), `inner_objective` ∘ `predict(train=True)`, and the next carry."""
        prediction, carry = self.predict(
            hypers, params, carry, batch, train=True, generator=generator
        )
        return self.inner_objective(hypers, params, prediction, batch), carry

    @final
    def outer_loss(
        self, hypers: Hypers, params: Params, carry: Carry, batch: Batch
    ) -> tuple[Tensor, Carry]:
        """Return L_V(λ, w), `outer_objective` ∘ `predict(train=False)`, and the next carry."""
        prediction, carry = self.predict(hypers, params, carry, batch, train=False, generator=None)
        return self.outer_objective(hypers, params, prediction, batch), carry
