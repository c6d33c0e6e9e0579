"""A Nyström sketch of A, inverted in a form that is stable for small damping."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.solvers.linear_solve.base import (
    COLD_START,
    Guess,
    LinearSolve,
    Product,
    Solved,
    check_tolerance,
    relative_norm,
)
from bilevel.validate import positive, whole

ROWS = 4
"""With this many rows for each column, a Gaussian Ω is well conditioned (below 3) as it is."""


@final
@dataclass(frozen=True)
class Nystrom(LinearSolve):
    """x = (Â + ρI)⁻¹ v with the low-rank Â = AΩ (ΩᵀAΩ)⁺ (AΩ)ᵀ.

    Ω [m, rank] is random, and orthonormal where m is small. The solution equals the damped solve if
    the rank of A is at most `rank`. The solve holds `rank` vectors of the size of w.

    Woodbury's identity in its usual form subtracts numbers of size 1/ρ² from each other.
    Here Â = Q S Qᵀ with an orthonormal Q, so that the solution is
    Q (S + ρI)⁻¹ Qᵀv + (I − QQᵀ)v/ρ, as accurate for small ρ as the damped system allows. Directions
    of negative curvature in ΩᵀAΩ are left out of Â and reported.

    The residual is that of A x = v without damping. On CUDA, the eigenvalues of two [rank, rank]
    matrices wait for the device.

    Args:
        rank: the number of columns of Ω.
        damping: ρ.
        tolerance: on ‖A x − v‖/‖v‖; above it, a solver warns.

    Source: Hataya & Yamada, AISTATS 2023, equation 6, with Gaussian directions in place of random
        columns; the stable form: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 2023,
        algorithm 2.1.
    """

    rank: int = 10
    damping: float = 0.01
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        whole(1, rank=self.rank)
        positive(damping=self.damping)
        check_tolerance(self.tolerance)

    def solve(
        self,
        product: Product,
        v: Float[Tensor, " m"],
        guess: Guess = COLD_START,
        generator: torch.Generator | None = None,
    ) -> Solved:
        rank = min(self.rank, len(v))
        Ω = torch.randn(rank, len(v), generator=generator, dtype=v.dtype, device=v.device)
        if len(v) < ROWS * rank:
            Ω = torch.linalg.qr(Ω.T).Q.T.contiguous()
        Y = torch.empty_like(Ω)  # a row for each direction
        for j in range(rank):
            Y[j] = product(Ω[j])
        core = Ω @ Y.T
        del Ω
        # eigh raises on NaN, but a NaN must reach x and the residual
        values, vectors = torch.linalg.eigh(torch.nan_to_num(core + core.T) / 2)
        cutoff = values.abs().max() * rank * torch.finfo(v.dtype).eps
        root = torch.where(values > cutoff, values.clamp_min(torch.finfo(v.dtype).tiny).rsqrt(), 0)
        Q, R = torch.linalg.qr(Y.T)
        del Y
        T = R @ (vectors * root)
        spectrum, basis = torch.linalg.eigh(torch.nan_to_num(T @ T.T))  # of S
        inside = Q.T @ v
        outside = v - Q @ inside
        # project a second time: a rounding error of the first would be divided by ρ
        correction = Q.T @ outside
        inside, outside = inside + correction, outside - Q @ correction
        x = (
            Q @ (basis @ (basis.T @ inside / (spectrum.clamp(min=0) + self.damping)))
            + outside / self.damping
        )
        square, r = v.dot(v), v - product(x)
        negative = values.min() < -cutoff
        return Solved(
            x,
            relative_norm(r.dot(r), square),
            torch.full_like(square, rank),
            negative,
            spectrum.max(),
            remainder=r,
        )
