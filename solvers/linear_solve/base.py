"""Solves of A x = v for a symmetric A that is known by its products alone, all on the device and without waiting for it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel import BilevelError

Product: TypeAlias = Callable[[Tensor], Tensor]
"""q ↦ A q, [m] → [m]."""


ROUNDING = 10
"""Machine epsilons, relative to the largest eigenvalue, below which curvature has no sign."""


class Guess(NamedTuple):
    """What one solve leaves to the next.

    Attributes:
        x: where to begin; None for 0.
        eigenvector: where the power iteration begins; None for v.
    """

    x: Float[Tensor, " m"] | None = None
    eigenvector: Float[Tensor, " m"] | None = None


COLD_START = Guess()


class Solved(NamedTuple):
    """What a solve found; everything lies on the device.

    Attributes:
        x: the last iterate.
        residual: ‖A x − v‖/‖v‖, 0 where v is 0.
        iterations: how many were taken.
        negative_curvature: whether a direction p with pᵀA p < 0 was met; by CG, with pᵀA p ≤ 0, as in a singular A.
        largest: a lower bound on the largest |eigenvalue| of A, where one is known.
        eigenvector: what the power iteration has come to, for the next one.
    """

    x: Float[Tensor, " m"]
    residual: Float[Tensor, ""]
    iterations: Float[Tensor, ""]
    negative_curvature: Bool[Tensor, ""]
    largest: Float[Tensor, ""] | None = None
    eigenvector: Float[Tensor, " m"] | None = None


class LinearSolve(ABC):
    """A way to solve A x = v. It has no state of its own: what one solve leaves to the next is handed to it.

    Attributes:
        tolerance: the relative residual above which a solver that uses it warns.
        continues: whether it can begin at the x of a guess.
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
        """A solution, as good as its budget allows.

        Args:
            product: q ↦ A q, the same symmetric A at every call.
            v: [m].
            guess: what the last solve of a system like this one has come to; its tensors are used up (memory counts here).
            generator: on the device of v; of the draws of those that draw.
        """


@final
@dataclass(frozen=True)
class Identity(LinearSolve):
    """x = `scale` · v, as if A were I/`scale`: one step of gradient descent with that learning rate, unrolled.

    One product is spent on the residual.

    Args:
        scale: the learning rate; where the hypergradient goes to an optimizer that normalizes it, it weighs the indirect term
            against the direct one alone.
        tolerance: on ‖A x − v‖/‖v‖; by default a solver does not warn of what was chosen with open eyes.

    Source: Luketina et al., ICML 2016 (T1–T2).
    """

    scale: float = 1.0
    tolerance: float = float("inf")

    def __post_init__(self) -> None:
        check_positive(scale=self.scale, tolerance=self.tolerance)

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        image = product(v)
        square, curvature, left = v.dot(v), v.dot(image), self.scale * image - v
        return Solved(
            self.scale * v,
            relative_norm(left.dot(left), square),
            torch.zeros_like(square),
            curvature < 0,
        )


def warm_start(product: Product, v: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor]:
    """x₀ and v − A x₀: the guess, scaled so that the residual is least (an exact guess keeps its scale); 0 where v is 0."""
    if guess is None:
        return torch.zeros_like(v), v.clone()
    image = product(guess)
    square = image.dot(image)
    scale = torch.where(square > 0, image.dot(v) / square, 0)
    r = torch.addcmul(v, image, -scale)
    return guess.mul_(scale), r


def relative_norm(residual: Tensor, square: Tensor) -> Tensor:
    """‖r‖/‖v‖ from the squares."""
    return torch.where(square > 0, (residual / square).sqrt(), 0)


def check_positive(**values: float | None) -> None:
    """Raise where a setting of a solve is too small to do anything."""
    for name, value in values.items():
        if value is None:
            continue
        if name in ("iterations", "terms", "rank"):
            fits, wanted = value >= 1, "1 or more"
        elif name == "tolerance":
            fits, wanted = value >= 0, "0 or more"
        else:
            fits, wanted = 0 < value < math.inf, "a positive and finite number"
        if not fits:
            what = "is no tolerance" if name == "tolerance" else "solves nothing"
            raise BilevelError(f"{name}={value} {what}; choose {wanted}")
