"""The floating-point format of products in a run: float32, TensorFloat-32 or bfloat16."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError, Refused, SpeedWarning
from bilevel.half_weights import HALF
from bilevel.params import Batch, Carry, Hypers, Params, Prediction
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.requirements import Trait
from bilevel.solver import Solver
from bilevel.validate import one_of

PRECISIONS = ("fp32", "tf32", "bf16")


class Autocast(ProblemWrapper):
    """`problem` with the products of `predict` in bfloat16 (`torch.autocast`).

    w, λ and the carry keep their types, and predictions are returned in float32. So both
    objectives, all penalties on w, and a solver's own computations on them are in float32.
    Gradients, forward-mode derivatives and second derivatives pass through the same bfloat16
    products.

    Example:
        >>> from bilevel.problems import digits
        >>> problem = Autocast(digits(hidden=[8]))
        >>> params, carry = problem.init(torch.Generator())
        >>> hypers = problem.space.constrain(problem.space.init())
        >>> batch = (torch.zeros(2, 1, 8, 8),)
        >>> problem.predict(hypers, params, carry, batch, train=False, generator=None)[0].dtype
        torch.float32
    """

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Return the initial w and carry of the problem.

        Raises:
            BilevelError: they are not float32, the only type that autocast narrows.
        """
        params, carry = self.problem.init(generator)
        if odd := [
            name for name, p in params.items() if p.is_floating_point() and p.dtype != torch.float32
        ]:
            kind = str(params[odd[0]].dtype).removeprefix("torch.")
            raise BilevelError(
                f"runner.precision=bf16 leaves `{odd[0]}` in {kind}, since autocast narrows "
                "float32 alone; give the problem float32 weights, or use runner.precision=fp32, "
                "which keeps every type"
            )
        return params, carry

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
        device = next(iter(params.values())).device.type
        # no cache, so that every pass differentiates its own casts
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            prediction, after = self.problem.predict(
                hypers, params, carry, batch, train=train, generator=generator
            )
        return pytree.tree_map(_to_float32, prediction), {
            name: t.to(carry[name].dtype) for name, t in after.items()
        }

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        device = next(iter(params.values())).device.type
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return self.problem.statistics(hypers, params, carry, batch, generator)


def at_precision(problem: Problem, solver: Solver, precision: str, device: torch.device) -> Problem:
    """Return the problem that `solver` works on at `precision`.

    Raises:
        Refused: the solver takes differences that are smaller than the rounding of bfloat16.

    Warns:
        SpeedWarning: `tf32` on a device without TensorFloat-32.
    """
    if precision == "tf32" and device.type != "cuda":
        warnings.warn(
            (
                f"runner.precision=tf32 has no effect on {device.type}, which has no "
                "TensorFloat-32; the run continues in float32"
            ),
            SpeedWarning,
            stacklevel=3,
        )
    if precision != "bf16":
        return problem
    if Trait.SUBTRACTS in solver.traits:
        raise Refused(
            f"{type(solver).__name__} follows the difference of nearly equal numbers, which "
            "bfloat16 rounds to 3 digits; use runner.precision=fp32 or tf32, or a solver that "
            "differentiates (for SAMA: finite_difference=false)"
        )
    return Autocast(problem)


def has_half_products(problem: Problem, params: Params) -> bool:
    """Return whether products have 16 bits, so that a small difference has no correct digit."""
    while isinstance(problem, ProblemWrapper):
        if isinstance(problem, Autocast):
            return True
        problem = problem.problem
    return any(p.dtype in HALF for p in params.values())


def check_precision(precision: str) -> None:
    """Raise where the precision is unknown."""
    one_of(PRECISIONS, **{"runner.precision": precision})


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of CUDA's products inside: TensorFloat-32 for `tf32`, otherwise float32.

    PyTorch's own default is mixed: matrix products are in float32, and convolutions are not.
    """
    switches: list[tuple[Any, str, Any]]
    matrices, cudnn, narrow = torch.backends.cuda.matmul, torch.backends.cudnn, precision == "tf32"
    switches = [(place, "allow_tf32", narrow) for place in (matrices, cudnn)]
    try:
        before = [getattr(place, name) for place, name, _ in switches]
    except RuntimeError:  # after use of the newer switches (PyTorch 2.9) these cannot be read
        newer: Any = cudnn
        wanted = "tf32" if narrow else "ieee"
        switches = [
            (place, "fp32_precision", wanted) for place in (matrices, newer.conv, newer.rnn)
        ]
        before = [getattr(place, name) for place, name, _ in switches]
    for place, name, value in switches:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _to_float32(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
