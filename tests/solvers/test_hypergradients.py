"""Hypergradients of all solvers: closed forms, predicted errors, identities between solvers."""

from functools import partial

import pytest
import torch

from bilevel.problems import ElasticNet, Quadratic, Ridge
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.solvers import (
    CG,
    SAMA,
    SOBA,
    Dense,
    EvolutionStrategies,
    FixedPoint,
    Forward,
    GaussNewton,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    Reverse,
    SelfTuning,
    Unrolled,
)
from tests.support.solver_cases import ready, set_to, sgd

PROBLEMS = {
    "quadratic": partial(Quadratic.random, weights=6, hypers=3, dtype=torch.float64),
    "quadratic, λ in L_V": partial(
        Quadratic.random, weights=6, hypers=3, direct=0.7, seed=2, dtype=torch.float64
    ),
    "one weight, one λ": partial(
        Quadratic.random, weights=1, hypers=1, direct=0.7, dtype=torch.float64
    ),
    "ridge": partial(Ridge.synthetic, features=5, dtype=torch.float64),
    "ridge per feature": partial(
        Ridge.synthetic, features=5, per_feature=True, dtype=torch.float64
    ),
    "diabetes": partial(Ridge.diabetes, dtype=torch.float64),
    "expected dropout": partial(
        InputDropout.synthetic, features=5, expected=True, dtype=torch.float64
    ),
    "expected dropout per feature": partial(
        InputDropout.synthetic, features=5, expected=True, per_feature=True, dtype=torch.float64
    ),
    "elastic net": partial(ElasticNet.synthetic, features=5, smoothing=0.5, dtype=torch.float64),
}
all_problems = pytest.mark.parametrize("make_problem", PROBLEMS.values(), ids=PROBLEMS)

LONG = 250
"""Terms and steps after which (1 − 1/10)^n is 4e-12; the condition number is 10."""

EXACT = {
    "CG": lambda rate: Implicit(linear_solve=CG(iterations=30, tolerance=1e-14)),
    "CG, Gauss–Newton": lambda rate: Implicit(
        linear_solve=CG(iterations=30, tolerance=1e-14), curvature=GaussNewton()
    ),
    "Neumann": lambda rate: Implicit(linear_solve=Neumann(terms=LONG)),
    "fixed point": lambda rate: Implicit(linear_solve=FixedPoint(iterations=LONG)),
    "Nyström": lambda rate: Implicit(linear_solve=Nystrom(rank=12, damping=1e-11)),
    "reverse": lambda rate: Unrolled(inner_steps=LONG, inner_optimizer=sgd(rate)),
    "reverse, checkpointed": lambda rate: Unrolled(
        inner_steps=LONG, inner_optimizer=sgd(rate), mode=Reverse(checkpoint=True)
    ),
    "forward": lambda rate: Unrolled(inner_steps=LONG, inner_optimizer=sgd(rate), mode=Forward()),
}


def at_best_response(problem, solver):
    """The solver with w = w*(λ₀), where a method that assumes it is as good as it can be."""
    solver = ready(problem, solver)
    for name, value in problem.best_response(
        problem.space.constrain(solver.core.search.u0)
    ).items():
        set_to(solver.core.weights.tensors[name], value)
    return solver


def exact(problem):
    return problem.hypergradient(problem.space.constrain(problem.space.init(torch.float64)))


def dense(problem):
    """Return H = ∇²_w L_T, M = ∂²L_T/∂w∂u, g = ∇_w L_V and ∂L_V/∂u at w*(λ₀), by torch.func."""
    u = problem.space.init(torch.float64)
    w = problem.best_response(problem.space.constrain(u))
    ((name, value),) = w.items()
    data = problem.data(torch.device("cpu"), torch.Generator())

    def inner(x, u):
        return problem.inner_loss(
            problem.space.constrain(u), {name: x.reshape(value.shape)}, {}, data.train.peek(), None
        )[0]

    def outer(x, u):
        return problem.outer_loss(
            problem.space.constrain(u), {name: x.reshape(value.shape)}, {}, data.valid.peek()
        )[0]

    x = value.reshape(-1)
    mixed = torch.func.jacrev(torch.func.grad(inner), argnums=1)(x, u)
    return torch.func.hessian(inner)(x, u), mixed, *torch.func.grad(outer, argnums=(0, 1))(x, u)


def rate(problem):
    """1/L, the largest step that a gradient method may take with confidence."""
    return 1 / float(torch.linalg.eigvalsh(dense(problem)[0]).max())


def close(one, other, rtol):
    torch.testing.assert_close(one, other, rtol=0, atol=rtol * float(other.norm()))


# --- exact settings ---


@all_problems
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_exact_settings_give_the_closed_form(make, make_problem):
    problem = make_problem()
    close(at_best_response(problem, make(rate(problem))).hypergradient(), exact(problem), 1e-8)


@all_problems
def test_the_closed_forms_are_those_of_the_losses(make_problem):
    H, M, g, direct = dense(make_problem())
    close(direct - M.T @ torch.linalg.solve(H, g), exact(make_problem()), 1e-10)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_a_problem_in_which_lambda_acts_on_validation_alone_has_the_direct_term_alone(make):
    problem = Quadratic.random(weights=4, hypers=2, direct=1.0, dtype=torch.float64)
    problem.B = torch.zeros_like(problem.B)
    solver = at_best_response(problem, make(rate(problem)))
    close(solver.hypergradient(), -problem.lambda_bar, 1e-12)  # λ₀ = 0


DIRECT = EXACT | {
    "identity": lambda rate: Implicit(linear_solve=Identity()),
    "SAMA": lambda rate: SAMA(),
    "SOBA": lambda rate: SOBA(),
    "penalty": lambda rate: Penalty(),
    "Δ-STN": lambda rate: SelfTuning(response=Dense(), tune_scale=False),
    "STN": lambda rate: SelfTuning(
        centered=False, regularized_w0=False, linearize=False, response=Dense(), tune_scale=False
    ),
    "evolution strategies": lambda rate: EvolutionStrategies(),
}


@pytest.mark.parametrize("make", DIRECT.values(), ids=DIRECT)
def test_the_direct_term_is_part_of_every_hypergradient(make):
    """With and without P, the hypergradients differ by P(λ − λ̄), for any response."""
    gradients = []
    for direct in (0.0, 1.0):
        solver = at_best_response(Quadratic.random(direct=direct, dtype=torch.float64), make(0.5))
        gradients.append(solver.hypergradient())
    wanted = -solver.core.problem.lambda_bar
    tolerance = (
        3.0 if isinstance(solver, EvolutionStrategies) else 1e-8
    )  # of a few random directions
    close(gradients[1] - gradients[0], wanted, tolerance)
    assert (gradients[1] - gradients[0]) @ wanted > 0


# --- truncated settings: wrong by the predicted amount ---


@pytest.mark.parametrize("terms", [1, 3, 10])
@all_problems
def test_truncation_costs_what_theory_says(make_problem, terms):
    """K terms of Neumann, of the fixed point and of truncated SGD lack −Mᵀ(I − ηH)^K H⁻¹g."""
    problem, (H, M, g, _) = make_problem(), dense(make_problem())
    step = 0.7 * rate(problem)
    rest = torch.linalg.matrix_power(torch.eye(len(H)) - step * H, terms)
    wanted = exact(problem) + M.T @ rest @ torch.linalg.solve(H, g)
    assert (wanted - exact(problem)).norm() > 1e-7 * exact(problem).norm()
    for make in (
        lambda: Implicit(linear_solve=Neumann(terms=terms, step=step)),
        lambda: Implicit(linear_solve=FixedPoint(iterations=terms, step=step), warm_start=False),
        lambda: Unrolled(inner_steps=terms, inner_optimizer=sgd(step)),
        lambda: Unrolled(
            inner_steps=terms + 5, inner_optimizer=sgd(step), mode=Reverse(truncate=terms)
        ),
        lambda: Unrolled(inner_steps=terms, inner_optimizer=sgd(step), mode=Forward()),
    ):
        close(at_best_response(problem, make()).hypergradient(), wanted, 1e-12)


@pytest.mark.parametrize("name", ["quadratic", "ridge per feature", "elastic net"])
def test_conjugate_gradients_are_exact_after_d_steps_and_not_before(name):
    problem = PROBLEMS[name]()
    d = len(dense(problem)[0])
    errors = [
        (
            at_best_response(problem, Implicit(linear_solve=CG(iterations=k))).hypergradient()
            - exact(problem)
        ).norm()
        for k in (d - 1, d)
    ]
    assert (
        errors[1] < 1e-10 * exact(problem).norm() < 1e-4 * exact(problem).norm() < errors[0] * 1e2
    )


@pytest.mark.parametrize("name", ["quadratic", "ridge per feature"])
def test_the_penalty_is_off_by_one_over_its_weight(name):
    """At the minimizers y and z the error falls as 1/σ."""
    problem, errors = PROBLEMS[name](), []
    for weight in (1e3, 1e4):
        solver = at_best_response(problem, Penalty(weight=weight, weight_max=weight))
        place_penalized(solver, problem, weight)
        errors.append((solver.hypergradient() - exact(problem)).norm())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] < 1e-2 * exact(problem).norm()


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_the_penalty_on_a_quadratic_is_what_theory_says(weight):
    """The hypergradient is direct − Mᵀ(H + V/σ)⁻¹g with V = ∇²_w L_V.

    L_T is bilinear in (λ, w), and y − w* = −(σH + V)⁻¹g.
    """
    problem = PROBLEMS["quadratic, λ in L_V"]()
    H, M, g, direct = dense(problem)
    solver = at_best_response(problem, Penalty(weight=weight, weight_max=weight))
    place_penalized(solver, problem, weight)
    close(
        solver.hypergradient(), direct - M.T @ torch.linalg.solve(H + problem.M / weight, g), 1e-10
    )


def place_penalized(solver, problem, weight):
    """Return y = argmin L_V/σ + L_T, by one Newton step: both losses are quadratic in w."""
    u = problem.space.init(torch.float64)
    hypers = problem.space.constrain(u)
    ((name, y),) = solver.method.penalized.tensors.items()

    def loss(x):
        params = {name: x.reshape(y.shape)}
        inner = problem.inner_loss(hypers, params, {}, solver.core.data.train.peek(), None)[0]
        return (
            problem.outer_loss(hypers, params, {}, solver.core.data.valid.peek())[0] / weight
            + inner
        )

    x = y.detach().reshape(-1)
    set_to(y, x - torch.linalg.solve(torch.func.hessian(loss)(x), torch.func.grad(loss)(x)))


# --- identities between solvers ---


@all_problems
def test_sama_with_plain_sgd_is_the_identity_solver(make_problem):
    identity = at_best_response(make_problem(), Implicit(linear_solve=Identity(scale=0.4)))
    exact_cross = at_best_response(
        make_problem(), SAMA(inner_optimizer=sgd(0.4), finite_difference=False)
    )
    close(exact_cross.hypergradient(), identity.hypergradient(), 1e-12)


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
def test_a_finite_difference_tends_to_the_identity_solver(name):
    """The central difference of DARTS and SAMA has an error of α²; on ridge it is rounding alone.

    Ridge is quadratic in w.
    """
    identity = at_best_response(
        PROBLEMS[name](), Implicit(linear_solve=Identity(scale=0.4))
    ).hypergradient()
    close(
        at_best_response(
            PROBLEMS[name](), SAMA(inner_optimizer=sgd(0.4), alpha=0.1)
        ).hypergradient(),
        identity,
        1e-10,
    )
    smoothed = PROBLEMS["elastic net"]
    wanted = at_best_response(
        smoothed(), Implicit(linear_solve=Identity(scale=0.4))
    ).hypergradient()
    errors = [
        float(
            (
                at_best_response(
                    smoothed(), SAMA(inner_optimizer=sgd(0.4), alpha=alpha)
                ).hypergradient()
                - wanted
            ).norm()
        )
        for alpha in (2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@all_problems
def test_one_differentiated_step_is_the_identity_solver_at_a_stationary_point(make_problem):
    unrolled = at_best_response(make_problem(), Unrolled(inner_steps=1, inner_optimizer=sgd(0.4)))
    identity = at_best_response(make_problem(), Implicit(linear_solve=Identity(scale=0.4)))
    close(unrolled.hypergradient(), identity.hypergradient(), 1e-12)


@all_problems
def test_forward_mode_is_reverse_mode_away_from_the_minimum_too(make_problem):
    modes = [
        ready(
            make_problem(),
            Unrolled(inner_steps=7, inner_optimizer=sgd(0.1, momentum=0.9), mode=mode),
            away=0.5,
        )
        for mode in (Reverse(), Forward())
    ]
    close(modes[1].hypergradient(), modes[0].hypergradient(), 1e-10)


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
def test_a_trained_response_gives_the_closed_form(name):
    """Return Δ-STN with a dense Θ at its fixed point −H⁻¹M; test_theory.py trains it there."""
    problem, (H, M, _, _) = PROBLEMS[name](), dense(PROBLEMS[name]())
    solver = at_best_response(problem, SelfTuning(response=Dense(), tune_scale=False))
    (theta,) = solver.method.theta.leaves
    set_to(theta, -torch.linalg.solve(H, M))
    close(solver.hypergradient(), exact(problem), 1e-10)
