"""Laws of all linear solves, against dense solves."""

import math

import pytest
import torch

from bilevel import BilevelError
from bilevel.solvers import CG, FixedPoint, Guess, Identity, Neumann, Nystrom, Solved
from bilevel.solvers.linear_solve.base import estimated_error
from bilevel.solvers.linear_solve.curvature import Hessian
from tests.support.linear_systems import SIZES, error, solve, spd


def exactly(size):
    """Return solves that are exact on a matrix with condition 10."""
    return {
        "CG": CG(iterations=2 * size, tolerance=0.0),
        "Neumann": Neumann(terms=600),
        "Neumann with a step": Neumann(terms=600, step=1.5),
        "fixed point": FixedPoint(iterations=600),
        "Nyström": Nystrom(rank=size, damping=1e-12),
    }


EVERY = list(exactly(1)), [CG(), Neumann(), FixedPoint(), Nystrom(), Identity()]
every = pytest.mark.parametrize("method", EVERY[1], ids=lambda m: type(m).__name__)


@pytest.mark.parametrize("name", EVERY[0])
@pytest.mark.parametrize("size", SIZES)
def test_every_solve_with_enough_effort_is_a_dense_solve(size, name):
    A, v = spd(size)
    solved = solve(exactly(size)[name], A, v)
    assert error(solved.x, A, v) < 1e-10
    assert solved.residual < 1e-10
    assert not solved.negative_curvature


@every
def test_the_solution_for_zero_is_zero(method):
    A, _ = spd(5)
    stale = Guess(
        torch.ones(5).double(),
        torch.zeros(5).double() if isinstance(method, (Neumann, FixedPoint)) else None,
    )
    for guess in (Guess(), stale):
        solved = solve(method, A, torch.zeros(5).double(), guess)
        assert torch.equal(solved.x, torch.zeros(5).double()) or (
            method.continues and isinstance(method, FixedPoint)
        )
        assert torch.isfinite(solved.x).all()
        assert solved.residual == 0


@every
def test_products_that_are_nan_give_a_nan_residual(method):
    A, v = spd(5)
    solved = method.solve(lambda q: A @ q * math.nan, v)
    assert not torch.isfinite(solved.residual)


@every
def test_a_product_may_return_what_it_was_given(method):
    """Use the identity matrix, which copies nothing."""
    _, v = spd(5)
    guess = Guess(
        torch.randn(5).double(),
        torch.randn(5).double() if isinstance(method, (Neumann, FixedPoint)) else None,
    )
    expected = v / 1.01 if isinstance(method, Nystrom) else v
    torch.testing.assert_close(method.solve(lambda q: q, v, guess).x, expected)


# --- the estimate of the error ---


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_estimate_is_exact_for_a_multiple_of_the_identity(scale):
    _, v = spd(5)
    A = scale * torch.eye(5).double()
    x = v / scale + 0.2 * torch.randn(5).double() / scale
    torch.testing.assert_close(estimated_error(x, v, v - A @ x).item(), error(x, A, v))
    assert estimated_error(v / scale, v, torch.zeros(5).double()) == 0


def test_the_estimate_of_no_solution_is_one_and_of_nan_is_nan():
    _, v = spd(5)
    nothing = torch.zeros(5).double()
    assert estimated_error(nothing, v, v.clone()) == 1
    assert estimated_error(nothing, nothing, nothing.clone()) == 0
    assert estimated_error(v, v, v * math.nan).isnan()


# --- the identity ---


def test_the_identity_scales():
    A, v = spd(5)
    solved = solve(Identity(scale=0.3), A, v)
    assert torch.equal(solved.x, 0.3 * v)
    assert solved.iterations == 0
    assert solve(Identity(scale=0.5), 2 * torch.eye(5).double(), v).residual == 0


# --- settings ---


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: CG(iterations=0), "iterations=0"),
        (lambda: CG(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: Neumann(terms=0), "terms=0"),
        (lambda: Neumann(step=0.0), "step=0.0"),
        (lambda: FixedPoint(step=-1.0), "step=-1.0"),
        (lambda: Nystrom(rank=0), "rank=0"),
        (lambda: Nystrom(damping=0.0), "damping=0.0"),
        (lambda: Identity(scale=math.nan), "scale=nan"),
        (lambda: Hessian(damping=-0.1), "damping=-0.1"),
    ],
)
def test_a_setting_that_solves_nothing_is_refused(make, setting):
    with pytest.raises(BilevelError, match=setting):
        make()


def test_solved_is_all_on_the_device():
    A, v = spd(5)
    assert all(isinstance(t, torch.Tensor) for t in Solved(*solve(Neumann(), A, v)))


@pytest.mark.parametrize(
    "solve", [Neumann(terms=60, step=1e30), FixedPoint(iterations=60, step=1e30)]
)
def test_a_step_so_large_that_the_iterate_overflows_is_refused_too(solve):
    """NaN compares with nothing: the bound is then that of the power iteration."""
    A = torch.tensor([2.0, 1.0])
    with pytest.raises(BilevelError, match=r"step=1e\+30 is above 2/L = 1"):
        solve.solve(lambda q: A * q, torch.ones(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: Neumann(step=bad),
        lambda bad: FixedPoint(step=bad),
        lambda bad: Nystrom(damping=bad),
        lambda bad: Identity(scale=bad),
    ],
)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
def test_a_setting_that_is_not_positive_and_finite_is_an_error(make, bad):
    with pytest.raises(BilevelError, match="must be positive and finite; choose a number above 0"):
        make(bad)
