"""The base class of problems that change a part of another problem."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.metrics import Reported
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, Prediction
from bilevel.problem import Problem


class ProblemWrapper(Problem):
    """A problem that passes every call to `problem`.

    A subclass changes what differs: initial weights, precision, or the examples of one process.
    """

    sharded: ClassVar[bool] = False
    """Whether each process computes its part of a batch alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.space = problem.space

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        return self.problem.init(generator)

    def fresh_carry(self, carry: Carry, batch: Batch) -> Carry:
        return self.problem.fresh_carry(carry, batch)

    def outer_carry(self, carry: Carry, last: Carry | None, batch: Batch) -> Carry:
        return self.problem.outer_carry(carry, last, batch)

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        return self.problem.data(device, generator)

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
        return self.problem.predict(hypers, params, carry, batch, train=train, generator=generator)

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        return self.problem.statistics(hypers, params, carry, batch, generator)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self.problem.inner_objective(hypers, params, prediction, batch)

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self.problem.outer_objective(hypers, params, prediction, batch)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return self.problem.derived(means)

    def exact(self, hypers: Hypers) -> Metrics:
        return self.problem.exact(hypers)

    def exact_hypergradient(self, hypers: Hypers) -> Tensor | None:
        return self.problem.exact_hypergradient(hypers)

    def pictures(self, hypers: Hypers, generator: torch.Generator) -> dict[str, Tensor]:
        return self.problem.pictures(hypers, generator)

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Reported:
        return self.problem.metrics(hypers, params, prediction, batch)


def of_one_process(problem: Problem) -> Problem:
    """Return the problem that computes whole batches, below the one that shards them, if any."""
    inner: Problem = problem
    while isinstance(inner, ProblemWrapper):
        if inner.sharded:
            return inner.problem
        inner = inner.problem
    return problem


def class_name(problem: Problem) -> str:
    """Return the name of the class that a user wrote, below all wrappers."""
    while isinstance(problem, ProblemWrapper):
        problem = problem.problem
    return type(problem).__name__
