"""In which floating-point format a run multiplies: float32, TensorFloat-32 or bfloat16."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError, Refused, SpeedWarning
from bilevel.params import Batch, Carry, Hypers, Params, Prediction
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.requirements import Trait
from bilevel.solver import Solver
from bilevel.text import near

PRECISIONS = ("fp32", "tf32", "bf16")


class Autocast(ProblemWrapper):
    """`problem`, with the products of `predict` in bfloat16 (`torch.autocast`).

    w, λ and the carry stay as they are, and predictions come back in float32, so that both objectives, all penalties on w and
    whatever a solver does with them are computed in float32. Gradients, forward-mode and second derivatives go through the
    same bfloat16 products.

    Example:
        >>> from bilevel.problems import digits
        >>> problem = Autocast(digits(hidden=[8]))
        >>> params, carry = problem.init(torch.Generator())
        >>> hypers = problem.space.constrain(problem.space.init())
        >>> problem.predict(hypers, params, carry, (torch.zeros(2, 1, 8, 8),), train=False, generator=None)[0].dtype
        torch.float32
    """

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Those of the problem.

        Raises:
            BilevelError: they are not float32, and autocast would leave them alone in silence.
        """
        params, carry = self.problem.init(generator)
        if odd := [
            name for name, p in params.items() if p.is_floating_point() and p.dtype != torch.float32
        ]:
            kind = str(params[odd[0]].dtype).removeprefix("torch.")
            raise BilevelError(
                f"precision=bf16 would leave `{odd[0]}` in {kind}, since autocast narrows float32 alone; "
                "give the problem float32 weights, or use precision=fp32, which keeps every type as it is"
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
        # without the cache, so that a cast is made, and differentiated, where it is used: passes differ in what they follow
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            prediction, after = self.problem.predict(
                hypers, params, carry, batch, train=train, generator=generator
            )
        return pytree.tree_map(_widened, prediction), {
            name: t.to(carry[name].dtype) for name, t in after.items()
        }


def at_precision(problem: Problem, solver: Solver, precision: str, device: torch.device) -> Problem:
    """The problem as `solver` meets it at `precision`.

    Raises:
        Refused: the solver takes differences in which bfloat16's rounding would drown.

    Warns:
        SpeedWarning: `tf32` on a device that has none.
    """
    if precision == "tf32" and device.type != "cuda":
        warnings.warn(
            f"precision=tf32 changes nothing on {device.type}, which has no TensorFloat-32; the run goes on in float32",
            SpeedWarning,
            stacklevel=3,
        )
    if precision != "bf16":
        return problem
    if Trait.SUBTRACTS in solver.traits:
        raise Refused(
            f"{type(solver).__name__} follows the difference of nearly equal numbers, which bfloat16 rounds to 3 digits; "
            "use precision=fp32 or tf32, or a solver that differentiates (of SAMA: finite_difference=false)"
        )
    return Autocast(problem)


def check_precision(precision: str) -> None:
    """Raise where there is no such precision."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise BilevelError(
            f"runner.precision={precision!r}{near(str(precision), PRECISIONS)} is none of {known}; choose one"
        )


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, CUDA multiplies float32 as TensorFloat-32 if `precision` is `tf32`, and as float32 otherwise.

    PyTorch's own default is neither: matrix products are exact there and convolutions are not.
    """
    switches: list[tuple[Any, str, Any]]
    matrices, cudnn, narrow = torch.backends.cuda.matmul, torch.backends.cudnn, precision == "tf32"
    switches = [(place, "allow_tf32", narrow) for place in (matrices, cudnn)]
    try:
        before = [getattr(place, name) for place, name, _ in switches]
    except (
        RuntimeError
    ):  # someone has set the newer switches (PyTorch 2.9), and these cannot be read any more
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


def _widened(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
