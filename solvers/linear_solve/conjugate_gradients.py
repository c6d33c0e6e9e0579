"""Conjugate gradients by products alone, on the device and without waiting for it."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.solvers.linear_solve.base import (
    COLD_START,
    ROUNDING,
    Guess,
    LinearSolve,
    Product,
    Solved,
    check_positive,
    relative_norm,
    warm_start,
)


@final
@dataclass(frozen=True)
class CG(LinearSolve):
    """Conjugate gradients: with exact arithmetic, solved after as many iterations as A has distinct eigenvalues.

    The last iterate is returned. Once the residual is within `tolerance`, or once negative curvature is met, x stays as it is
    (by masks, so that the device is not waited for: the products still cost). Negative curvature at the very first direction
    leaves x at its guess. The guess is scaled so that its residual is least: a stale one is never worse than 0, and what grew
    along a direction of negative curvature does not grow on from one solve to the next.

    The residual is that of the recursion, which rounding parts from A x − v by about machine precision times the condition.

    Args:
        iterations: at most.
        tolerance: on ‖A x − v‖/‖v‖.

    Source: Hestenes & Stiefel, 1952; in this field Pedregosa, ICML 2016 (HOAG).

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> CG(iterations=2).solve(lambda q: A @ q, torch.ones(2)).x
        tensor([0.5000, 0.2500])
    """

    iterations: int = 10
    tolerance: float = 1e-6
    continues = True

    def __post_init__(self) -> None:
        check_positive(iterations=self.iterations, tolerance=self.tolerance)

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        square = v.dot(v)
        x, r = warm_start(product, v, guess.x)
        p, rr = r.clone(), r.dot(r)
        negative = torch.zeros_like(square, dtype=torch.bool)
        eps = torch.finfo(v.dtype).eps
        # below machine precision, the recursion would go on with residuals and curvature that are rounding alone
        bound, rounding = max(self.tolerance, eps) ** 2 * square, ROUNDING * eps
        iterations, active = torch.zeros_like(square), rr > bound
        largest, pp = torch.zeros_like(square), rr
        for _ in range(self.iterations):
            image = product(p)
            curvature = p.dot(image)
            largest = torch.where(active, torch.maximum(largest, curvature.abs() / pp), largest)
            positive = curvature > rounding * largest * pp
            negative = negative | (active & ~positive)
            active = active & positive
            step = torch.where(active, rr / curvature, 0)
            x.addcmul_(p, step)
            r.addcmul_(image, -step)
            del image  # before the next product makes another
            after = r.dot(r)
            turn = torch.where(active, after / rr, 0)
            torch.addcmul(r, p, turn, out=p)
            iterations, rr, pp = iterations + active, after, after + turn * turn * pp  # r ⊥ p
            active = active & (rr > bound)
        return Solved(x, relative_norm(rr, square), iterations, negative)
