"""The Neumann series and fixed-point iterations against their predicted errors."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bilevel import BilevelError
from bilevel.solvers import CG, FixedPoint, Guess, Neumann
from bilevel.solvers.linear_solve.neumann import power_iteration
from tests.support.linear_systems import SIZES, error, laws, products, solve, spd, systems


@laws
@given(
    st.sampled_from(SIZES),
    st.floats(0, 3),
    st.floats(0.05, 1.95),
    st.integers(1, 60),
    st.integers(0, 10**6),
)
@example(1, 0.0, 1.0, 1, 0)
def test_the_error_of_a_series_is_the_term_that_it_predicts(size, condition, step, terms, seed):
    """x_K − A⁻¹v = −(I − ηA)ᴷ A⁻¹v, entry by entry."""
    A, v = spd(size, 10**condition, seed=seed)
    solved = solve(Neumann(terms=terms, step=step), A, v)
    exact = torch.linalg.solve(A, v)
    predicted = torch.linalg.matrix_power(torch.eye(size).double() - step * A, terms) @ exact
    torch.testing.assert_close(
        exact - solved.x, predicted, rtol=1e-7, atol=1e-11 * exact.norm().item()
    )


def test_the_error_of_a_series_shrinks_by_its_rate():
    """Along the last eigenvector, the error is exactly (1 − η/10)ᴷ."""
    A, _ = spd(30)
    slow = torch.linalg.eigh(A).eigenvectors[:, 0]
    for terms in (1, 10, 50):
        assert error(solve(Neumann(terms=terms, step=1.0), A, slow).x, A, slow) == pytest.approx(
            0.9**terms, rel=1e-9
        )


@laws
@systems
def test_k_terms_are_k_fixed_point_iterations_from_zero_and_the_sum_itself(
    size, condition, scale, seed
):
    A, v = spd(size, 10**condition, 10**scale, seed)
    for step in (None, 10**-scale):
        series, point = (
            solve(Neumann(terms=20, step=step), A, v),
            solve(FixedPoint(iterations=20, step=step), A, v),
        )
        assert (series.x - point.x).norm() <= 1e-12 * point.x.norm()
    term, total = v.clone(), torch.zeros_like(v)
    for _ in range(20):
        total, term = total + step * term, term - step * A @ term
    assert (series.x - total).norm() <= 1e-12 * total.norm()


@laws
@given(
    st.sampled_from([*SIZES, 200]),
    st.floats(0, 6),
    st.floats(-6, 6),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_the_default_step_never_diverges(size, condition, scale, seed, hidden):
    """With `hidden`, the power iteration has not seen the largest eigenvector."""
    A, v = spd(size, 10**condition, 10**scale, seed)
    vectors = torch.linalg.eigh(A).eigenvectors
    guess = Guess()
    if hidden and size > 1:
        guess = Guess(eigenvector=vectors[:, 0].clone())  # the worst warm start
    for method in (Neumann(terms=60), FixedPoint(iterations=60)):
        before = math.inf
        for count in (1, 5, 60):
            few = type(method)(count)
            at = Guess(eigenvector=None if guess.eigenvector is None else guess.eigenvector.clone())
            solved = solve(few, A, v, at)
            assert solved.residual <= min(1.0, before) * (1 + 1e-9)
            before = solved.residual
        assert solved.x.norm() <= torch.linalg.solve(A, v).norm() * (1 + 1e-6) * 3
        assert solved.largest <= 10**scale * (1 + 1e-9)


def test_a_step_of_one_over_a_bound_too_low_would_have_diverged():
    """The law above can fail: the first bound alone is too low if the eigenvector is hidden."""
    A, v = spd(30, 1000.0)
    hidden = torch.linalg.eigh(A).eigenvectors[:, 0]
    low, _ = power_iteration(lambda q: A @ q, hidden.clone(), 1)
    r = v.clone()
    for _ in range(20):
        r = r - A @ r / low
    assert r.norm() > 1e10 * v.norm()
    assert solve(Neumann(terms=20), A, v, Guess(eigenvector=hidden)).residual < 1


def test_the_default_step_reports_an_indefinite_matrix_and_does_not_diverge():
    A, v = spd(30)
    solved = solve(Neumann(terms=500), A - 0.5 * torch.eye(30).double(), v)
    assert solved.negative_curvature
    assert solved.residual <= 1


def test_the_power_iteration_continues_the_last_one():
    A, v = spd(30, 5.0)
    guess, bounds = Guess(), []
    for _ in range(100):
        solved = Neumann(terms=1).solve(lambda q: A @ q, v, guess)
        guess = Guess(eigenvector=solved.eigenvector)
        bounds.append(solved.largest.item())
    assert bounds[0] < 1 - 1e-3
    assert 1 - bounds[-1] < 0.3 * (1 - bounds[0])
    assert max(bounds) <= 1 + 1e-12
    # a solve for v = 0 leaves a zero vector, which v replaces
    zero = Guess(eigenvector=torch.zeros(30).double())
    assert solve(Neumann(terms=1), A, v, zero).largest > 0.5


def test_the_power_iteration_costs_one_product_when_warm():
    A, v = spd(5)
    for method, cold, warm in ((Neumann(7), 27, 8), (FixedPoint(7), 27, 9), (CG(7), 7, 8)):
        product, seen = products(A)
        solved = method.solve(product, v)
        assert len(seen) == cold
        method.solve(product, v, Guess(solved.x, solved.eigenvector))
        assert len(seen) == cold + warm


@pytest.mark.parametrize("method", [Neumann(7, step=0.5), FixedPoint(7, step=0.5)])
def test_a_set_step_needs_no_power_iteration_and_no_product_for_the_residual(method):
    """K − 1 products make K terms; a warm start costs one more."""
    A, v = spd(5)
    product, seen = products(A)
    solved = method.solve(product, v)
    assert len(seen) == 6
    assert solved.eigenvector is None
    method.solve(product, v, Guess(solved.x, solved.eigenvector))
    assert len(seen) == 12 + method.continues


@pytest.mark.parametrize("make", [Neumann, FixedPoint])
@pytest.mark.parametrize("step", [0.3, 0.6])
def test_one_step_still_has_a_product_by_which_it_is_checked(make, step):
    A, v = spd(5, scale=4.0)
    v = torch.linalg.eigh(A).eigenvectors[:, -1].clone()
    if step > 0.5:
        with pytest.raises(BilevelError, match=r"step=0\.6 is above 2/L = 0\.5,"):
            make(1, step=step).solve(lambda q: A @ q, v)
    else:
        assert solve(make(1, step=step), A, v).residual < 1


@pytest.mark.parametrize("make", [Neumann, FixedPoint])
def test_a_step_above_two_over_the_largest_eigenvalue_is_refused(make):
    A, v = spd(5, scale=4.0)
    assert solve(make(10, step=0.49), A, v).residual < 1.1
    for step in (0.51, 1.0, 1e6):
        with pytest.raises(
            BilevelError,
            match=rf"step={re.escape(f'{step:g}')} is above 2/L = 0\.5.* choose a smaller step",
        ):
            make(10, step=step).solve(lambda q: A @ q, v)
