"""Gradient descent on ½ xᵀA x − vᵀx: the Neumann series and fixed-point iterations."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import BilevelError
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
from bilevel.validate import positive, whole

COLD, WARM = 20, 1
"""Power iterations from an arbitrary vector, and from the last vector of the last solve."""


class Richardson(LinearSolve):
    """Richardson iterations x ← x + η r, r ← r − η A r with the residual r = v − A x.

    After K iterations from 0, r is (I − ηA)ᴷ v.

    The default step is η = 1/L. L is a lower bound on the largest |eigenvalue|, from power
    iterations (20 at the first solve, one at each later solve, which continues the last one) and
    from the growth ‖Ar‖/‖r‖ of every residual. This bound may be too low: a power iteration may not
    have seen the largest eigenvector yet, and no safety factor corrects for that. So η is also at
    most rᵀAr/‖Ar‖², clipped at 0. With this bound, for every symmetric A,

        ‖r − ηAr‖² = ‖r‖² − 2η rᵀAr + η²‖Ar‖² ≤ ‖r‖² − η rᵀAr ≤ ‖r‖²

    The residual never grows, and x never diverges. If A is positive definite and L is exact, the
    second bound is at least 1/L, and η is constant.

    A step that the user sets is used as it is. The last of K steps then costs no product: the
    remainder and the residual are those of the iterate before it. They are upper bounds if
    0 ≤ A ≤ 2/η. There is no power iteration: if step · L > 2, the residuals turn to the largest
    eigenvector, and the solve raises as soon as their growth shows it. This test reads from the
    device, and so waits for it, at every solve.
    """

    step: float | None

    def _check_step(self) -> None:
        """Require a positive step or none, and a tolerance."""
        if self.step is not None:
            positive("choose a number above 0, or null for 1/L", step=self.step)
        check_tolerance(self.tolerance)

    def _iterate(
        self, product: Product, v: Tensor, x: Tensor, r: Tensor, count: int, known: Tensor | None
    ) -> Solved:
        square, eps = v.dot(v), torch.finfo(v.dtype).eps
        nothing = eps**2 * square  # a smaller residual is rounding error
        largest, eigenvector, step = None, known, square
        if self.step is None:
            # a known vector that is 0 is replaced by v
            start = v.clone() if known is None else known.addcmul_(v, (known.norm() == 0).to(v))
            largest, eigenvector = power_iteration(product, start, COLD if known is None else WARM)
        products = count if self.step is None else max(count - 1, 1)
        seen = []
        for _ in range(products):
            image = product(r)
            seen += [r.dot(r), r.dot(image), image.dot(image)]
            if largest is None:
                x.add_(r, alpha=self.step)
                r.sub_(image, alpha=self.step)
            else:
                largest, step = _default_step(largest, nothing, *seen[-3:])
                x.addcmul_(r, step)
                r.addcmul_(image, step, value=-1)
            del image  # free it before the next product allocates another
        for _ in range(count - products):
            x.add_(r, alpha=self.step)
        rr, curvature, growth = torch.stack(seen).view(-1, 3).unbind(1)
        real = rr > nothing
        growth = (growth / rr).sqrt()
        # an overflow of a step that is too large leaves no valid bound
        bound = torch.where(real & growth.isfinite(), growth, 0).max()
        largest = bound if largest is None else torch.maximum(largest, bound)
        negative = (real & (curvature < -ROUNDING * eps * largest * rr)).any()
        if self.step is not None and bool(self.step * largest > 2):
            raise BilevelError(
                f"step={self.step:g} is above 2/L = {2 / float(largest):.3g}, where L is the "
                f"largest eigenvalue of the curvature, and {type(self).__name__} diverges; choose "
                "a smaller step, or step=null for 1/L"
            )
        return Solved(
            x,
            relative_norm(r.dot(r), square),
            torch.full_like(square, count),
            negative,
            largest,
            eigenvector,
            remainder=r,
        )


def _default_step(
    largest: Tensor, nothing: Tensor, rr: Tensor, curvature: Tensor, growth: Tensor
) -> tuple[Tensor, Tensor]:
    """Return L, at least the growth of r, and the step: at most 1/L and rᵀAr/‖Ar‖²."""
    largest = torch.maximum(largest, torch.where(rr > nothing, growth / rr, 0).sqrt())
    bounds = (
        torch.where(largest > 0, 1 / largest, 0),
        torch.where(growth > 0, curvature / growth, 0),
    )
    return largest, torch.minimum(*bounds).clamp(min=0)


@final
@dataclass(frozen=True)
class Neumann(Richardson):
    """The truncated series x = η Σ_{k<K} (I − ηA)ᵏ v, with the error (I − ηA)ᴷ A⁻¹v.

    It equals K steps of gradient descent that are unrolled at a stationary point, and K fixed-point
    iterations from 0. η is chosen as in `FixedPoint`.

    Args:
        terms: K. They cost K − 1 products if the step is set. Otherwise they cost K, and a power
            iteration one more.
        step: η; None for 1/L.
        tolerance: on ‖A x − v‖/‖v‖; above it, a solver warns.

    Raises:
        BilevelError: a set step is above 2/L, as far as the residuals show L. The solve raises it,
            and waits for the device then.

    Source: Lorraine et al., AISTATS 2020, algorithm 3.

    Example:
        >>> solved = Neumann(terms=3, step=0.5).solve(lambda q: q, torch.ones(1))
        >>> solved.x, solved.residual
        (tensor([0.8750]), tensor(0.2500))
    """

    terms: int = 10
    step: float | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        whole(1, terms=self.terms)
        self._check_step()

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        return self._iterate(
            product, v, torch.zeros_like(v), v.clone(), self.terms, guess.eigenvector
        )


@final
@dataclass(frozen=True)
class FixedPoint(Richardson):
    """K iterations x ← x − η (A x − v) from the last solution.

    The default step is η = 1/L, and at most rᵀAr/‖Ar‖². L is a lower bound on the largest
    |eigenvalue|, from power iterations and from the growth of the residuals r. With these bounds
    the residual cannot grow and x cannot diverge, for every symmetric A.

    Args:
        iterations: K.
        step: η; None for 1/L.
        tolerance: on ‖A x − v‖/‖v‖; above it, a solver warns.

    Raises:
        BilevelError: a set step is above 2/L, as far as the residuals show L. The solve raises it,
            and waits for the device then.

    Source: Grazzi et al., ICML 2020, section 2 (fixed-point method); with a warm start: Arbel &
        Mairal, ICLR 2022 (AmIGO).
    """

    iterations: int = 10
    step: float | None = None
    tolerance: float = 0.1
    continues = True

    def __post_init__(self) -> None:
        whole(1, iterations=self.iterations)
        self._check_step()

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        return self._iterate(
            product, v, *warm_start(product, v, guess.x), self.iterations, guess.eigenvector
        )


def power_iteration(
    product: Product, q: Float[Tensor, " m"], iterations: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " m"]]:
    """Return a lower bound on the largest |eigenvalue| of a symmetric A, and the last vector q.

    The bound is max_k ‖A q_k‖ with q_{k+1} = A q_k/‖A q_k‖.

    Args:
        product: q ↦ A q.
        q: the first vector, which is overwritten.
        iterations: the number of products.

    Example:
        >>> A = torch.tensor([3.0, 1.0])
        >>> power_iteration(lambda q: A * q, torch.ones(2), 50)
        (tensor(3.), tensor([1.0000e+00, 1.3930e-24]))
    """
    tiny = torch.finfo(q.dtype).tiny
    q.div_(q.norm().clamp_min(tiny))
    largest = torch.zeros_like(q[0])
    for _ in range(iterations):
        image = product(q)
        size = image.norm()
        largest = torch.maximum(largest, size)
        q = torch.div(image, size.clamp_min(tiny), out=q)
        del image
    return largest, q
