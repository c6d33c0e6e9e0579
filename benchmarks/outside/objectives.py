"""A bilevel problem from two functions, for the small problems of others."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from bilevel import Batch, Carry, Data, Hypers, Metrics, Params, Prediction, Problem, Space
from bilevel.data.tensor_stream import TensorStream
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.optim.optimized import Optimized

CPU = torch.device("cpu")

Objective = Callable[[Hypers, Params, Batch], Tensor]

Made = TypeVar("Made", bound=Descent)


@final
class InOrder(TensorStream):
    """Batches of consecutive examples, again and again in the same order."""

    def next(self) -> Batch:
        """Return the next `batch_size` examples."""
        size = self.batch_size or self.size
        start = self._position * size
        self._position = (self._position + 1) % (self.size // size)
        self.examples += size
        return self._slice(start, start + size)


@final
class Objectives(Problem):
    """L_T and L_V as functions of (λ, w, batch), from given initial weights.

    Args:
        space: λ.
        weights: the initial w, the same for every seed.
        inner: L_T.
        outer: L_V.
        train: a pytree of tensors with the training examples.
        valid: the same for validation.
        batch_size: number of examples in a batch of both splits; None for whole splits.
        in_order: take training batches in their own order instead of at random.
    """

    def __init__(
        self,
        space: Space,
        weights: Params,
        inner: Objective,
        outer: Objective,
        train: Any,
        valid: Any,
        *,
        batch_size: int | None = None,
        in_order: bool = False,
    ) -> None:
        self.space = space
        self.weights = weights
        self.inner = inner
        self.outer = outer
        self.splits = (train, valid)
        self.batch_size = batch_size
        self.in_order = in_order

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        return {name: w.clone() for name, w in self.weights.items()}, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        train, valid = self.splits
        kind = InOrder if self.in_order else TensorStream
        size = None if self.in_order else self.batch_size
        return Data(
            kind(train, self.batch_size, generator, device=device),
            TensorStream(valid, size, generator, device=device, name="valid"),
        )

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
        return dict(params), carry

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self.inner(hypers, prediction, batch)

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self.outer(hypers, prediction, batch)

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        return {"loss": self.outer(hypers, prediction, batch)}


def ready(problem: Problem, solver: Made, seed: int = 0) -> Made:
    """Return `solver`, set up on `problem` on the CPU."""
    data = problem.data(CPU, torch.Generator().manual_seed(seed))
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(seed))
    return solver


def sgd(lr: float) -> Any:
    """Return plain SGD as a function of the parameters."""
    return partial(torch.optim.SGD, lr=lr)


def rate(group: Optimized, lr: float) -> None:
    """Set the rate of an optimizer."""
    for part in group.optimizer.param_groups:
        part["lr"] = lr
