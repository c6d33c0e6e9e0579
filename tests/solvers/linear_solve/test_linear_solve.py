"""Linear solves by products alone, against dense solves; and wrong ones, which the same laws find out."""

import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bilevel import BilevelError
from bilevel.solvers import CG, FixedPoint, Guess, Identity, Neumann, Nystrom, Solved
from bilevel.solvers.linear_solve.curvature import Hessian
from bilevel.solvers.linear_solve.neumann import power_iteration

SIZES = [1, 2, 5, 30]
laws = settings(max_examples=40, deadline=None, derandomize=True)
systems = given(st.sampled_from(SIZES), st.floats(0, 4), st.floats(-3, 3), st.integers(0, 10**6))


def spd(size, condition=10.0, scale=1.0, seed=0):
    """A with distinct eigenvalues from `scale` down to `scale`/`condition`, and v, both in float64."""
    draws = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=draws).double()).Q
    values = scale * torch.logspace(0, -1, size, base=condition, dtype=torch.float64)
    A = Q * values @ Q.T
    return (A + A.T) / 2, torch.randn(size, generator=draws).double()


def products(A):
    """A as its product, and the list of what it is called with."""
    seen = []

    def product(q):
        seen.append(q.clone())
        return A @ q

    return product, seen


def error(x, A, v):
    """‖x − A⁻¹v‖/‖A⁻¹v‖."""
    exact = torch.linalg.solve(A, v)
    return ((x - exact).norm() / exact.norm()).item()


def solve(method, A, v, guess=None, seed=0):
    """One solve, of which everything that holds for all of them is checked."""
    before = A.clone(), v.clone()
    product, _ = products(A)
    solved = method.solve(
        product,
        v,
        *([] if guess is None else [guess]),
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(A, before[0])
    assert torch.equal(v, before[1])
    true = (A @ solved.x - v).norm() / v.norm() if bool(v.any()) else torch.zeros(())
    torch.testing.assert_close(solved.residual, true.double(), rtol=1e-6, atol=1e-11)
    assert all(
        t.shape == () for t in (solved.residual, solved.iterations, solved.negative_curvature)
    )
    return solved


def exactly(size):
    """Every solve, set so that it is exact on a matrix with condition 10."""
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
    """The identity matrix, without a copy."""
    _, v = spd(5)
    guess = Guess(
        torch.randn(5).double(),
        torch.randn(5).double() if isinstance(method, (Neumann, FixedPoint)) else None,
    )
    expected = v / 1.01 if isinstance(method, Nystrom) else v
    torch.testing.assert_close(method.solve(lambda q: q, v, guess).x, expected)


# --- conjugate gradients ---


@laws
@systems
def test_cg_is_exact_after_as_many_iterations_as_dimensions(size, condition, scale, seed):
    """Where float64 allows it: with 30 dimensions and a larger condition the directions lose their orthogonality before."""
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
    """Many further iterations change no bit, and are not counted."""
    A, v = spd(5)
    few, many = solve(CG(iterations=5), A, v), solve(CG(iterations=300), A, v)
    assert torch.equal(few.x, many.x)
    assert few.iterations == many.iterations == 5
    loose = solve(CG(iterations=300, tolerance=0.1), A, v)
    assert loose.iterations < 5
    assert 1e-6 < loose.residual <= 0.1


def test_cg_with_no_tolerance_does_not_take_rounding_for_curvature():
    A, v = spd(30, 1e4)
    solved = solve(CG(iterations=500, tolerance=0.0), A, v)
    assert not solved.negative_curvature
    assert error(solved.x, A, v) < 1e-10


def test_cg_notices_negative_curvature_and_keeps_the_iterate_before_it():
    """A = diag(1, −1): v = (2, 1) has vᵀAv = 3, and the direction after it, by hand, has none that is positive."""
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


def test_a_guess_is_where_cg_and_the_fixed_point_begin():
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


def test_a_warm_start_does_not_blow_up_where_the_curvature_is_negative():
    A, v = spd(30)
    A = A - 0.5 * torch.eye(30).double()
    guess = Guess()
    for _ in range(50):
        solved = CG(iterations=10).solve(lambda q: A @ q, v, guess)
        guess = Guess(solved.x)
    assert solved.negative_curvature
    assert solved.x.norm() < 1e3 * v.norm()


# Four ways in which packages have got CG wrong. Each is CG as it might be written, with one mistake.


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
    """The law: a dense solve, after as many iterations as dimensions; three eigenvalues at most, for the sake of rounding."""
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
        assert solves(
            lambda A, v: textbook(A, v, size, mistake=mistake), size
        )  # one step has no second direction
        assert not solves(lambda A, v: textbook(A, v, 2, mistake=mistake), size)
        return
    assert not solves(lambda A, v: textbook(A, v, size, mistake=mistake), size)


def test_in_one_dimension_the_iterate_before_convergence_is_zero():
    A, v = torch.tensor([[2.0]]).double(), torch.tensor([3.0]).double()
    assert textbook(A, v, 1, mistake=MISTAKES[2]) == 0
    assert solve(CG(), A, v).x.item() == 1.5


# --- Neumann and the fixed point ---


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
    """x_K − A⁻¹v = −(I − ηA)ᴷ A⁻¹v, entry by entry: neither more nor less."""
    A, v = spd(size, 10**condition, seed=seed)
    solved = solve(Neumann(terms=terms, step=step), A, v)
    exact = torch.linalg.solve(A, v)
    predicted = torch.linalg.matrix_power(torch.eye(size).double() - step * A, terms) @ exact
    torch.testing.assert_close(
        exact - solved.x, predicted, rtol=1e-7, atol=1e-11 * exact.norm().item()
    )


def test_the_error_of_a_series_shrinks_by_its_rate():
    """‖(I − ηA)‖ᴷ = (1 − η/10)ᴷ: along the last eigenvector exactly, a factor that a wrong rate would miss."""
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
    """Nor where the power iteration has not seen the largest eigenvector at all, as `hidden` here."""
    A, v = spd(size, 10**condition, 10**scale, seed)
    vectors = torch.linalg.eigh(A).eigenvectors
    guess = Guess()
    if hidden and size > 1:
        guess = Guess(
            eigenvector=vectors[:, 0].clone()
        )  # what a warm start could at worst have come to
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
    """That is why the law above can fail: the first estimate alone is too low where the eigenvector is hidden."""
    A, v = spd(30, 1000.0)
    hidden = torch.linalg.eigh(A).eigenvectors[:, 0]
    low, _ = power_iteration(lambda q: A @ q, hidden.clone(), 1)
    r = v.clone()
    for _ in range(20):
        r = r - A @ r / low
    assert r.norm() > 1e10 * v.norm()
    assert solve(Neumann(terms=20), A, v, Guess(eigenvector=hidden)).residual < 1


def test_on_an_indefinite_matrix_the_default_step_neither_diverges_nor_keeps_silent():
    A, v = spd(30)
    solved = solve(Neumann(terms=500), A - 0.5 * torch.eye(30).double(), v)
    assert solved.negative_curvature
    assert solved.residual <= 1


def test_the_power_iteration_begins_where_the_last_one_ended():
    A, v = spd(30, 5.0)
    guess, bounds = Guess(), []
    for _ in range(100):
        solved = Neumann(terms=1).solve(lambda q: A @ q, v, guess)
        guess = Guess(eigenvector=solved.eigenvector)
        bounds.append(solved.largest.item())
    assert bounds[0] < 1 - 1e-3
    assert 1 - bounds[-1] < 0.3 * (1 - bounds[0])
    assert max(bounds) <= 1 + 1e-12
    zero = Guess(
        eigenvector=torch.zeros(30).double()
    )  # what v = 0 leaves behind: v takes its place
    assert solve(Neumann(terms=1), A, v, zero).largest > 0.5


def test_the_power_iteration_costs_one_product_when_warm():
    A, v = spd(5)
    for method, cold, warm in ((Neumann(7), 27, 8), (FixedPoint(7), 27, 9), (CG(7), 7, 8)):
        product, seen = products(A)
        solved = method.solve(product, v)
        assert len(seen) == cold
        method.solve(product, v, Guess(solved.x, solved.eigenvector))
        assert len(seen) == cold + warm


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


# --- Nyström ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_nystrom_of_full_rank_is_the_damped_solve(size, damping):
    A, v = spd(size, 100.0)
    damped = A + damping * torch.eye(size).double()
    assert error(solve(Nystrom(rank=size, damping=damping), A, v).x, damped, v) < 1e-11
    assert error(solve(Nystrom(rank=10 * size, damping=damping), A, v).x, damped, v) < 1e-11


def test_the_error_of_nystrom_is_proportional_to_its_damping():
    """(A + ρI)⁻¹v − A⁻¹v ≈ −ρA⁻²v, down to where Woodbury's identity as it is written has no digit left."""
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


def test_nystrom_leaves_negative_curvature_out_and_says_so():
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0]).double())
    solved = solve(Nystrom(rank=3, damping=0.1), A, torch.ones(3).double())
    assert solved.negative_curvature
    assert torch.isfinite(solved.x).all()
    assert not solve(Nystrom(rank=3), A.abs(), torch.ones(3).double()).negative_curvature


def test_nystrom_draws_from_the_generator_that_it_is_given():
    A, v = spd(30)
    a, b, c = (solve(Nystrom(rank=3), A, v, seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


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
