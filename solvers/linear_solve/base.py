"""The interface of linear solves A x = v, where a symmetric A is given by its products q ↦ A q.

All computations stay on the device and do not wait for it, unless a class says otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel.validate import is_number, positive, wrong

Product: TypeAlias = Callable[[Tensor], Tensor]
"""q ↦ A q, [m] → [m]."""


ROUNDING = 10
"""Curvature below this many machine epsilons of the largest eigenvalue counts as zero."""


UNIMPORTANT = 1e-3
"""A relative residual or error below this gives no warning, however small the tolerance."""


class Guess(NamedTuple):
    """The start of a solve, taken from the result of the last solve.

    Attributes:
        x: the first iterate; None for 0.
        eigenvector: the first vector of the power iteration; None for v.
    """

    x: Float[Tensor, " m"] | None = None
    eigenvector: Float[Tensor, " m"] | None = None


COLD_START = Guess()


class Solved(NamedTuple):
    """The result of a solve, on the device.

    Attributes:
        x: the last iterate.
        residual: ‖A x − v‖/‖v‖, 0 where v is 0.
        iterations: the number of iterations.
        negative_curvature: True if the solve met a direction p with pᵀA p < 0. CG also reports
            pᵀA p = 0, as for a singular A.
        largest: a lower bound on the largest |eigenvalue| of A; None if unknown.
        eigenvector: the last vector of the power iteration, for the next solve.
        remainder: v − A x, of which `residual` is the relative length; None if unknown. A solver
            uses it up.
    """

    x: Float[Tensor, " m"]
    residual: Float[Tensor, ""]
    iterations: Float[Tensor, ""]
    negative_curvature: Bool[Tensor, ""]
    largest: Float[Tensor, ""] | None = None
    eigenvector: Float[Tensor, " m"] | None = None
    remainder: Float[Tensor, " m"] | None = None


class LinearSolve(ABC):
    """A way to solve A x = v. It has no state: the caller passes the result of the last solve.

    Attributes:
        tolerance: a solver warns if the relative residual ‖A x − v‖/‖v‖, of A without damping, or
            the estimated relative error of x is larger, but not below `UNIMPORTANT`.
        continues: True if the solve can start at the x of a guess.
    """

    tolerance: float = 0.1
    continues: ClassVar[bool] = False

    @abstractmethod
    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        """Return an approximate solution of A x = v.

        Args:
            product: q ↦ A q, with the same symmetric A at every call.
            v: [m].
            guess: the result of the last solve of a similar system; the solve overwrites its
                tensors, to save memory.
            generator: on the device of v, for solves that draw at random.
        """


@final
@dataclass(frozen=True)
class Identity(LinearSolve):
    """x = `scale` · v, the solution for A = I/`scale`: one unrolled step of gradient descent.

    One product is spent on the residual.

    Args:
        scale: the learning rate of the step. If the outer optimizer normalizes the hypergradient,
            `scale` is only the weight of the indirect term against the direct one.
        tolerance: on ‖A x − v‖/‖v‖; infinite by default, because this solve is inexact by choice.

    Source: Luketina et al., ICML 2016 (T1–T2).
    """

    scale: float = 1.0
    tolerance: float = float("inf")

    def __post_init__(self) -> None:
        positive(scale=self.scale)
        check_tolerance(self.tolerance)

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        image = product(v)
        square, curvature = v.dot(v), v.dot(image)
        r = torch.sub(v, image, alpha=self.scale)
        return Solved(
            self.scale * v,
            relative_norm(r.dot(r), square),
            torch.zeros_like(square),
            curvature < 0,
            remainder=r,
        )


def warm_start(product: Product, v: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first iterate x₀ and its residual v − A x₀.

    x₀ is the guess, scaled so that the residual is least. An exact guess keeps its scale. x₀ is 0
    for v = 0 and without a guess.
    """
    if guess is None:
        return torch.zeros_like(v), v.clone()
    image = product(guess)
    square = image.dot(image)
    scale = torch.where(square > 0, image.dot(v) / square, 0)
    r = torch.addcmul(v, image, -scale)
    return guess.mul_(scale), r


def relative_norm(residual: Tensor, square: Tensor) -> Tensor:
    """Return ‖r‖/‖v‖ from the squares, 0 for v = 0."""
    return torch.where(square > 0, (residual / square).sqrt(), 0)


def estimated_error(x: Tensor, v: Tensor, r: Tensor) -> Float[Tensor, ""]:
    """Return an estimate of ‖x − A⁻¹v‖/‖A⁻¹v‖ from r = v − A x, without a product.

    The error is A⁻¹r. The estimate takes r/μ for it, with the mean curvature μ = xᵀA x/xᵀx along x:

        ‖r/μ‖ / ‖x + r/μ‖    with    xᵀA x = xᵀ(v − r)

    It is exact for A = μI. It is too small where r lies in flatter directions than x.

    Args:
        x: [m], an approximate solution.
        v: [m].
        r: [m], which is overwritten.

    Example:
        >>> A, v = torch.tensor([0.5, 0.5]), torch.ones(2)
        >>> x = v / (A + 0.1)  # a damped solution, which should be 2
        >>> estimated_error(x, v, v - A * x)
        tensor(0.1667)
    """
    size, xx = torch.linalg.vector_norm(r), x.dot(x)
    inverse = xx / (x.dot(v) - x.dot(r))
    better = torch.addcmul(x, r, inverse, out=r)
    error = size * inverse.abs() / torch.linalg.vector_norm(better)
    return torch.where(xx * size == 0, size.sign(), error)


def check_tolerance(tolerance: float) -> None:
    """Require a number from 0 to infinity."""
    if not (is_number(tolerance) and tolerance >= 0):
        raise wrong("tolerance", tolerance, "must be at least 0", "choose 0 or more")
