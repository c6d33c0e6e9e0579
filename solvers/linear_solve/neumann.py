"""Gradient descent on ½ xᵀA x − vᵀx: the Neumann series and the fixed point, with a step that cannot diverge."""

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
    check_positive,
    relative_norm,
    warm_start,
)

COLD, WARM = 20, 1
"""Power iterations from an arbitrary vector, and from the last solve's."""


class Richardson(LinearSolve):
    """x ← x + η r, r ← r − η A r: the residual r = v − A x is a by-product, and after K iterations from 0 it is (I − ηA)ᴷ v.

    By default η = 1/L. L is a lower bound on the largest |eigenvalue|, by power iterations (20 at the first solve, then one
    from where the last one came to) and the growth ‖Ar‖/‖r‖ of every residual on the way. A lower bound may be too low, and no
    factor of safety makes up for an eigenvector that is not yet seen; so η is also at most rᵀAr/‖Ar‖², clipped at 0. With that

        ‖r − ηAr‖² = ‖r‖² − 2η rᵀAr + η²‖Ar‖² ≤ ‖r‖² − η rᵀAr ≤ ‖r‖²

    for every symmetric A: the residual never grows, and x never diverges. Where A is positive definite and L right, the second
    bound is never below 1/L, and η is constant.

    A step of the user's own stays what it is. If step · L > 2 it diverges, and is refused; that is read from the device, which
    waits for it, at every solve.
    """

    step: float | None

    def _iterate(
        self, product: Product, v: Tensor, x: Tensor, r: Tensor, count: int, known: Tensor | None
    ) -> Solved:
        square = v.dot(v)
        start = (
            v.clone() if known is None else known.addcmul_(v, (known.norm() == 0).to(v.dtype))
        )  # v where it is 0
        largest, eigenvector = power_iteration(product, start, COLD if known is None else WARM)
        first, eps = largest, torch.finfo(v.dtype).eps
        negative, nothing = torch.zeros_like(square, dtype=torch.bool), eps**2 * square
        for _ in range(count):
            image = product(r)
            rr, curvature, growth = r.dot(r), r.dot(image), image.dot(image)
            real = rr > nothing  # below, and down to where squares underflow, it is rounding
            largest = torch.maximum(largest, torch.where(real, growth / rr, 0).sqrt())
            negative = negative | (real & (curvature < -ROUNDING * eps * largest * rr))
            if self.step is None:
                bounds = (
                    torch.where(largest > 0, 1 / largest, 0),
                    torch.where(growth > 0, curvature / growth, 0),
                )
                step = torch.minimum(*bounds).clamp(min=0)
            else:
                step = torch.full_like(square, self.step)
            x.addcmul_(r, step)
            r.addcmul_(image, -step)
            del image  # before the next product makes another
        # an x that has overflowed says no L any more; that of the power iteration does
        bound = torch.where(torch.isfinite(largest), largest, first)
        if self.step is not None and bool(self.step * bound > 2):
            raise BilevelError(
                f"step={self.step:g} is above 2/L = {2 / float(bound):.3g}, where L is the largest eigenvalue of the "
                f"curvature, so that {type(self).__name__} diverges; choose a smaller step, or step=null for 1/L"
            )
        return Solved(
            x,
            relative_norm(r.dot(r), square),
            torch.full_like(square, count),
            negative,
            largest,
            eigenvector,
        )


@final
@dataclass(frozen=True)
class Neumann(Richardson):
    """The truncated series x = η Σ_{k<K} (I − ηA)ᵏ v, whose error is (I − ηA)ᴷ A⁻¹v.

    Equal to K steps of gradient descent unrolled at a stationary point, and to K fixed-point iterations from 0. How η is
    chosen and refused: see `FixedPoint`, whose arithmetic this is.

    Args:
        terms: K; a product each, of which the last one serves the residual.
        step: η; 1/L by default.
        tolerance: on ‖A x − v‖/‖v‖; above it, a solver warns.

    Raises:
        BilevelError: in a solve, which then waits for the device: the step is above 2/L.

    Source: Lorraine et al., AISTATS 2020, algorithm 3.

    Example:
        >>> solved = Neumann(terms=3, step=0.5).solve(lambda q: q, torch.ones(1))
        >>> solved.x, solved.residual
        (tensor([0.8750]), tensor(0.1250))
    """

    terms: int = 10
    step: float | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_positive(terms=self.terms, step=self.step, tolerance=self.tolerance)

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
    """K steps of x ← x − η (A x − v), from the last solution.

    By default η = 1/L, L being a lower bound on the largest |eigenvalue| by power iterations and by the growth of the
    residuals r on the way, and at most rᵀAr/‖Ar‖²; then the residual cannot grow, whatever the symmetric A, nor x diverge.

    Args:
        iterations: K.
        step: η; 1/L by default.
        tolerance: on ‖A x − v‖/‖v‖; above it, a solver warns.

    Raises:
        BilevelError: in a solve, which then waits for the device: the step is above 2/L.

    Source: Grazzi et al., ICML 2020, section 2 (fixed-point method); warm-started: Arbel & Mairal, ICLR 2022 (AmIGO).
    """

    iterations: int = 10
    step: float | None = None
    tolerance: float = 0.1
    continues = True

    def __post_init__(self) -> None:
        check_positive(iterations=self.iterations, step=self.step, tolerance=self.tolerance)

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
    """A lower bound max_k ‖A q_k‖ on the largest |eigenvalue| of a symmetric A, with q_{k+1} = A q_k/‖A q_k‖; the last q.

    Args:
        product: q ↦ A q.
        q: where to begin; used up.
        iterations: products.

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
