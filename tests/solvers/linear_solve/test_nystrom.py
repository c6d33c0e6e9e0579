"""The Nyström solve against damped dense solves."""

import pytest
import torch

from bilevel.solvers import Nystrom
from tests.support.linear_systems import SIZES, error, solve, spd


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_nystrom_of_full_rank_is_the_damped_solve(size, damping):
    A, v = spd(size, 100.0)
    damped = A + damping * torch.eye(size).double()
    assert error(solve(Nystrom(rank=size, damping=damping), A, v).x, damped, v) < 1e-11
    assert error(solve(Nystrom(rank=10 * size, damping=damping), A, v).x, damped, v) < 1e-11


def test_the_error_of_nystrom_is_proportional_to_its_damping():
    """(A + ρI)⁻¹v − A⁻¹v ≈ −ρA⁻²v, also for ρ at which Woodbury's identity has no digit left."""
    A, v = spd(30)
    exact = torch.linalg.solve(A, v)
    slope = torch.linalg.solve(A, exact)
    for damping in (1e-4, 1e-7, 1e-10):
        x = solve(Nystrom(rank=30, damping=damping), A, v).x
        torch.testing.assert_close(
            (exact - x) / damping, slope, rtol=5e-3, atol=5e-3 * slope.norm().item()
        )
    C = A  # all columns: x = v/ρ − C (A + CᵀC/ρ)⁻¹ Cᵀv/ρ², in floating point
    naive = v / damping - C @ torch.linalg.solve(A + C.T @ C / damping, C.T @ v) / damping**2
    damped = torch.linalg.solve(A + damping * torch.eye(30).double(), v)
    assert (naive - damped).norm() > 1e-6 * damped.norm() > 1e3 * (x - damped).norm()


@pytest.mark.parametrize("damping", [1e-8, 0.01])
def test_nystrom_is_exact_on_a_matrix_of_low_rank(damping):
    draws = torch.Generator().manual_seed(0)
    V, v = torch.randn(30, 4, generator=draws).double(), torch.randn(30, generator=draws).double()
    A = V @ V.T
    damped = A + damping * torch.eye(30).double()
    for rank in (4, 7):
        assert error(solve(Nystrom(rank=rank, damping=damping), A, v).x, damped, v) < 1e-6
    assert error(solve(Nystrom(rank=3, damping=damping), A, v).x, damped, v) > 1e-3


def test_nystrom_leaves_negative_curvature_out_and_reports_it():
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0]).double())
    solved = solve(Nystrom(rank=3, damping=0.1), A, torch.ones(3).double())
    assert solved.negative_curvature
    assert torch.isfinite(solved.x).all()
    assert not solve(Nystrom(rank=3), A.abs(), torch.ones(3).double()).negative_curvature


def test_nystrom_draws_from_its_generator():
    A, v = spd(30)
    a, b, c = (solve(Nystrom(rank=3), A, v, seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
