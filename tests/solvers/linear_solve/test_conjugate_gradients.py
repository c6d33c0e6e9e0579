"""Conjugate gradients against dense solves, and wrong variants that the laws must find."""

import pytest
import torch

from bilevel.solvers import CG, FixedPoint, Guess, Identity, Neumann, Nystrom
from tests.support.linear_systems import SIZES, error, laws, solve, spd, systems


@laws
@systems
def test_cg_is_exact_after_as_many_iterations_as_dimensions(size, condition, scale, seed):
    """In 30 dimensions the condition is smaller, or the directions lose their orthogonality."""
    A, v = spd(size, 10 ** (condition / (4 if size == 30 else 2)), 10**scale, seed)
    assert error(solve(CG(iterations=size, tolerance=0.0), A, v).x, A, v) < 1e-9


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_cg_is_not_exact_before(size):
    A, v = spd(size)
    errors = [
        error(solve(CG(iterations=k, tolerance=0.0), A, v).x, A, v) for k in range(1, size + 1)
    ]
    assert errors[-1] < 1e-12
    assert min(errors[:-1]) > 1e-5
    assert errors == sorted(errors, reverse=True)


def test_cg_needs_one_iteration_for_each_distinct_eigenvalue():
    A = torch.diag(torch.tensor([1.0, 1, 1, 4, 4, 9]).double())
    v = torch.ones(6).double()
    assert error(solve(CG(iterations=2), A, v).x, A, v) > 1e-2
    assert error(solve(CG(iterations=3), A, v).x, A, v) < 1e-14
    assert solve(CG(iterations=9), A, v).iterations == 3


def test_cg_stays_where_it_has_converged():
    """Further iterations change no bit and are not counted."""
    A, v = spd(5)
    few, many = solve(CG(iterations=5), A, v), solve(CG(iterations=300), A, v)
    assert torch.equal(few.x, many.x)
    assert few.iterations == many.iterations == 5
    loose = solve(CG(iterations=300, tolerance=0.1), A, v)
    assert loose.iterations < 5
    assert 1e-6 < loose.residual <= 0.1


def test_cg_without_tolerance_ignores_curvature_that_is_rounding():
    A, v = spd(30, 1e4)
    solved = solve(CG(iterations=500, tolerance=0.0), A, v)
    assert not solved.negative_curvature
    assert error(solved.x, A, v) < 1e-10


def test_cg_notices_negative_curvature_and_keeps_the_iterate_before_it():
    """For A = diag(1, −1), v = (2, 1) has vᵀAv = 3, but the second direction has pᵀAp < 0."""
    A, v = torch.diag(torch.tensor([1.0, -1.0]).double()), torch.tensor([2.0, 1.0]).double()
    solved = solve(CG(iterations=10), A, v)
    assert solved.negative_curvature
    assert solved.iterations == 1
    torch.testing.assert_close(solved.x, 5 / 3 * v)
    at_once = solve(CG(), -A, v)
    assert at_once.negative_curvature
    assert torch.equal(at_once.x, torch.zeros(2).double())
    assert at_once.residual == 1


def test_cg_on_a_singular_matrix_stays_finite():
    A, v = torch.diag(torch.tensor([1.0, 2.0, 0.0]).double()), torch.ones(3).double()
    solved = solve(CG(iterations=20), A, v)
    assert solved.negative_curvature  # pᵀAp = 0 is met
    assert solved.x.norm() < 10
    assert not solve(CG(iterations=20), A, A @ v).negative_curvature


def test_cg_and_the_fixed_point_start_at_the_guess():
    A, v = spd(30, 100.0)
    exact = torch.linalg.solve(A, v)
    near = exact + 1e-3 * torch.randn(30).double()
    for method in (CG(iterations=3), FixedPoint(iterations=3)):
        cold, warm = solve(method, A, v), solve(method, A, v, Guess(near.clone()))
        assert warm.residual < 1e-2 * cold.residual
        assert solve(method, A, v, Guess(exact.clone())).residual < 1e-13
        for stale in (-exact, 1e6 * torch.randn(30).double(), torch.zeros(30).double()):
            assert solve(method, A, v, Guess(stale.clone())).residual < 2 * cold.residual
    assert Neumann().continues is Nystrom().continues is Identity().continues is False
    for method in (Neumann(3), Nystrom(3), Identity()):
        assert torch.equal(solve(method, A, v).x, solve(method, A, v, Guess(near.clone())).x)


def test_a_warm_start_stays_bounded_under_negative_curvature():
    A, v = spd(30)
    A = A - 0.5 * torch.eye(30).double()
    guess = Guess()
    for _ in range(50):
        solved = CG(iterations=10).solve(lambda q: A @ q, v, guess)
        guess = Guess(solved.x)
    assert solved.negative_curvature
    assert solved.x.norm() < 1e3 * v.norm()


# CG with one mistake each, as found in published packages


def textbook(A, v, iterations, *, mistake=None):
    x, r, p, before = torch.zeros_like(v), v.clone(), v.clone(), torch.zeros_like(v)
    for _ in range(iterations):
        if r.norm() < 1e-12 * v.norm():
            break
        before = x
        alpha = r @ r / (p @ A @ p)
        x = x + (p if mistake == "the step scale is dropped" else alpha * p)
        after = r - alpha * A @ p
        beta = after @ after / (r @ r)
        if mistake != "the residual is not updated":
            r = after
        p = r + beta * p
    if mistake == "the iterate before convergence is returned":
        return before
    return -x if mistake == "the sign is wrong" else x


MISTAKES = [
    "the step scale is dropped",
    "the residual is not updated",
    "the iterate before convergence is returned",
    "the sign is wrong",
]


def solves(method, size):
    """Return whether a method is exact after as many iterations as dimensions.

    The large systems have three eigenvalues, because rounding spoils the law for more.
    """
    systems = [spd(size, scale=2.0, seed=seed) for seed in range(5)] if size < 5 else []
    for seed in range(5):
        Q = torch.linalg.eigh(spd(size, seed=seed)[0]).eigenvectors
        values = torch.tensor([2.0, 5.0, 9.0] * size)[:size].double()
        systems.append((Q * values @ Q.T, torch.ones(size).double()))
    return all(error(method(A, v), A, v) < 1e-8 for A, v in systems)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_law_finds_a_wrong_cg(mistake, size):
    assert solves(lambda A, v: CG(iterations=size, tolerance=0.0).solve(lambda q: A @ q, v).x, size)
    assert solves(lambda A, v: textbook(A, v, size), size)
    if size == 1 and mistake == "the residual is not updated":
        # one step has no second direction
        assert solves(lambda A, v: textbook(A, v, size, mistake=mistake), size)
        assert not solves(lambda A, v: textbook(A, v, 2, mistake=mistake), size)
        return
    assert not solves(lambda A, v: textbook(A, v, size, mistake=mistake), size)


def test_in_one_dimension_the_iterate_before_convergence_is_zero():
    A, v = torch.tensor([[2.0]]).double(), torch.tensor([3.0]).double()
    assert textbook(A, v, 1, mistake=MISTAKES[2]) == 0
    assert solve(CG(), A, v).x.item() == 1.5
