"""Conjugate gradients by products with A."""

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
    check_tolerance,
    relative_norm,
    warm_start,
)
from bilevel.validate import whole


@final
@dataclass(frozen=True)
class CG(LinearSolve):
    """Conjugate gradients: exact after as many iterations as A has distinct eigenvalues.

    This holds in exact arithmetic. The solve returns the last iterate. It stops to change x if the
    residual is within `tolerance` or if it meets negative curvature. It stops by masks, so it does
    not wait for the device, and the remaining products still cost. With negative curvature in the
    very first direction, x stays at its guess.

    The guess is scaled so that its residual is least. So a stale guess is never worse than 0, and
    growth along a direction of negative curvature does not accumulate over solves.

    The remainder is that of the recursion. Rounding separates it from A x − v by about the machine
    precision times the condition number.

    Args:
        iterations: the largest number of iterations.
        tolerance: on ‖A x − v‖/‖v‖. The solve stops within it, and a solver warns above it.

    Source: Hestenes & Stiefel, 1952; for hypergradients Pedregosa, ICML 2016 (HOAG).

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> CG(iterations=2).solve(lambda q: A @ q, torch.ones(2)).x
        tensor([0.5000, 0.2500])
    """

    iterations: int = 10
    tolerance: float = 1e-6
    continues = True

    def __post_init__(self) -> None:
        whole(1, iterations=self.iterations)
        check_tolerance(self.tolerance)

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
        eps, zero = torch.finfo(v.dtype).eps, torch.zeros_like(square)
        # below machine precision, residual and curvature are rounding errors: stop there
        bound, rounding = max(self.tolerance, eps) ** 2 * square, ROUNDING * eps
        largest, pp, active = zero, rr, rr > bound
        tried, taken = [], []
        for k in range(self.iterations):
            image = product(p)
            curvature = p.dot(image)
            quotient = curvature / pp
            largest = torch.maximum(largest, quotient)
            tried.append(active)
            active = active & (quotient > rounding * largest)
            taken.append(active)
            step = torch.where(active, rr / curvature, zero)
            x.addcmul_(p, step)
            r.addcmul_(image, step, value=-1)
            del image  # free it before the next product allocates another
            after = r.dot(r)
            if k + 1 < self.iterations:
                torch.addcmul(r, p, torch.where(active, after / rr, zero), out=p)
                pp, active = p.dot(p), active & (after > bound)
            rr = after
        took = torch.stack(taken)
        iterations = took.sum(dtype=v.dtype)
        negative = (torch.stack(tried) & ~took).any()
        return Solved(x, relative_norm(rr, square), iterations, negative, remainder=r)
