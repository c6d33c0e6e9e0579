"""Networks whose weights have 16 bits: solvers compute in float32, the problem gets λ narrowed."""

import torch
from torch import Tensor

from bilevel.metrics import Reported
from bilevel.params import Batch, Carry, Hypers, Params, Prediction
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper

HALF = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a solver's own numbers for weights of type `dtype`.

    It is float32 at least: in 16 bits a step of λ is often smaller than the rounding of λ.

    Example:
        >>> wide(torch.float16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


class HalfWeights(ProblemWrapper):
    """`problem` with λ cast from float32 to the type of its weights.

    A product of λ and x then keeps the type of x, which the layers require. Derivatives pass
    through the cast, so that a solver receives them in float32.
    """

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
        return self.problem.predict(
            _narrowed(hypers, params), params, carry, batch, train=train, generator=generator
        )

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        return self.problem.statistics(_narrowed(hypers, params), params, carry, batch, generator)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        narrowed = _narrowed(hypers, params)
        return self.problem.inner_objective(narrowed, params, prediction, batch)

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        narrowed = _narrowed(hypers, params)
        return self.problem.outer_objective(narrowed, params, prediction, batch)

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Reported:
        return self.problem.metrics(_narrowed(hypers, params), params, prediction, batch)


def for_weights(problem: Problem, params: Params) -> Problem:
    """Return the problem to call with λ in float32: `HalfWeights` for weights of 16 bits."""
    half = any(p.dtype in HALF for p in params.values())
    return HalfWeights(problem) if half and not isinstance(problem, HalfWeights) else problem


def _narrowed(hypers: Hypers, params: Params) -> Hypers:
    kind = next(p.dtype for p in params.values() if p.is_floating_point())
    return {name: leaf.to(kind) for name, leaf in hypers.items()}
