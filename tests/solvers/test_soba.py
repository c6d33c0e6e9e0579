"""Tests of SOBA against its formulas in dense matrices, and of its adjoint."""

from functools import partial

import pytest
import torch

from bilevel.solvers import Fixed
from bilevel.solvers.soba import SOBA
from tests.support.dense_derivatives import (
    F64,
    Noisy,
    all_problems,
    at_minimum,
    close,
    dense,
    flat,
    quadratic,
    ridge,
    truth,
)
from tests.support.solver_cases import normed, ready, sgd


@all_problems
def test_the_fixed_point_of_soba_is_the_closed_form(make_problem):
    solver = ready(make_problem(), SOBA())
    at_minimum(solver)
    gradient, H, _, outer_gradient, _ = dense(solver)
    assert gradient.norm() < 1e-12
    solver.method.adjoint = -torch.linalg.solve(H, outer_gradient)
    close(solver.hypergradient(), truth(solver.core.problem), 1e-10)
    at = solver.method.directions(solver.core.data.train.peek(), solver.core.data.valid.peek())
    assert max(at.w.norm(), at.q.norm()) < 1e-11
    assert at.metrics["residual"] < 1e-11


@pytest.mark.parametrize("make_problem", [quadratic, ridge, Noisy])
def test_a_step_of_soba_is_its_three_formulas_at_one_point(make_problem):
    """The steps are simultaneous: with w or q first, q or λ would differ by more than rounding."""
    α, β, γ = 0.1, 0.2, 0.3
    solver = ready(
        make_problem(), SOBA(adjoint_lr=β, inner_optimizer=sgd(α), outer_optimizer=sgd(γ)), away=0.5
    )
    w, u = flat(solver.core.weights.leaves), solver.core.search.u.detach().clone()
    q = solver.method.adjoint = torch.randn(w.shape, dtype=F64)
    masks = solver.core.generator.get_state()
    gradient, H, cross, outer_gradient, direct = dense(solver)
    assert q @ H @ q > 0
    later = dense(solver, w - α * gradient)
    solver.step()
    close(flat(solver.core.weights.leaves), w - α * gradient, 1e-12)
    close(solver.method.adjoint, q - β * (H @ q + outer_gradient), 1e-12)
    close(solver.core.search.u.detach(), u - γ * (cross.T @ q + direct), 1e-12)
    assert torch.equal(solver.core.search.u0, solver.core.search.u.detach())

    assert not torch.equal(solver.core.generator.get_state(), masks) or not isinstance(
        solver.core.problem, Noisy
    )
    assert not torch.allclose(
        solver.method.adjoint, q - β * (later[1] @ q + later[3]), rtol=1e-4, atol=1e-4
    )
    moved = q - β * (H @ q + outer_gradient)
    assert not torch.allclose(
        solver.core.search.u, u - γ * (cross.T @ moved + direct), rtol=1e-4, atol=1e-4
    )


def test_the_weights_of_soba_are_trained_as_plain_training_would():
    """Momentum, clipping and schedule apply; batch-norm statistics are those of the one pass."""
    options = {
        "inner_optimizer": sgd(0.1, momentum=0.9),
        "clip_norm": 0.5,
        "inner_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    }
    problem = normed()
    ours, plain = ready(problem, SOBA(**options)), ready(problem, Fixed(inner_steps=1, **options))
    for _ in range(4):
        for solver in (ours, plain):
            solver.step(warmup=True)
            solver.epoch_ended(None)
        close(flat(ours.core.weights.leaves), flat(plain.core.weights.leaves), 1e-11)
        for name, statistic in plain.core.carry.items():
            torch.testing.assert_close(ours.core.carry[name], statistic)
    assert (ours.inner_count, ours.outer_count) == (4, 0)
    assert torch.equal(ours.core.search.u, problem.space.init(F64))
    assert ours.method.adjoint.norm() > 0


def test_the_adjoint_comes_to_its_solution_at_the_rate_of_one_over_L():
    """At a fixed w the error falls by 1 − μ/L = 9/10 a step, once L has been found."""
    solver = ready(quadratic(), SOBA(inner_optimizer=sgd(0.0)))
    _, H, _, outer_gradient, _ = dense(solver)
    exact, errors = -torch.linalg.solve(H, outer_gradient), []
    for _ in range(2):
        for _ in range(60):
            metrics = solver.step(warmup=True)
        errors.append((solver.method.adjoint - exact).norm())
    assert metrics["largest_eigenvalue"] == pytest.approx(1.0, abs=1e-6)
    assert errors[1] / errors[0] == pytest.approx(0.9**60, rel=0.01)
    assert metrics["residual"] == pytest.approx(
        float((H @ (solver.method.adjoint - exact)).norm() / outer_gradient.norm()), rel=0.2
    )


def test_no_step_of_the_adjoint_more_than_doubles_it():
    """The power iteration begins in the eigenvector of the smallest eigenvalue, 1/1000 of L."""
    solver = ready(quadratic(condition=1000.0), SOBA(inner_optimizer=sgd(0.0)))
    _, H, _, outer_gradient, _ = dense(solver)
    solver.method.top, solver.method.adjoint = (
        torch.linalg.eigh(H)[1][:, 0],
        torch.randn(5, dtype=F64),
    )
    for _ in range(60):
        before = solver.method.adjoint
        L = max((H @ solver.method.top).norm(), (H @ before).norm() / before.norm())
        solver.step(warmup=True)
        close(solver.method.adjoint, before - (H @ before + outer_gradient) / L, 1e-10)
        assert (solver.method.adjoint + outer_gradient / L).norm() <= 2 * before.norm() * (1 + 1e-9)


def test_an_adjoint_step_above_two_over_L_gives_a_warning_and_diverges():
    metrics = {}  # w stays at the start, of which the solver warns apart from its method
    for rate in (1.9, 2.1):
        solver = ready(quadratic(), SOBA(adjoint_lr=rate, inner_optimizer=sgd(0.0)))
        for _ in range(100):
            metrics[rate] = solver.step(warmup=True)
        metrics[rate] = {name: float(value) for name, value in metrics[rate].items()}
        metrics[rate]["warnings"] = solver.method.warnings(metrics[rate])
    assert metrics[1.9]["residual"] < 1e-3
    assert metrics[1.9]["warnings"] == {}
    assert metrics[2.1]["residual"] > 10
    assert set(metrics[2.1]["warnings"]) == {"adjoint_lr", "residual"}
    assert "adjoint_lr=2.1 is at least 2.1/L" in metrics[2.1]["warnings"]["adjoint_lr"]
    assert solver.method.warnings({}) == {}


def test_negative_curvature_does_not_carry_the_adjoint_off_and_gives_a_warning():
    """With H + 2|κ|I the adjoint stays bounded; with H it would grow as 1.5^t along −1/2."""
    problem = quadratic()
    eigenvalues, vectors = torch.linalg.eigh(problem.A)
    eigenvalues[0] = -0.5
    problem.A = vectors * eigenvalues @ vectors.T
    solver = ready(problem, SOBA(inner_optimizer=sgd(0.0)))
    for _ in range(150):
        metrics = solver.step(warmup=True)
    rest = solver.method.adjoint
    metrics = {name: float(value) for name, value in solver.step(warmup=True).items()}
    close(solver.method.adjoint, rest, 1e-6)
    curvature = rest @ problem.A @ rest / (rest @ rest)
    assert curvature < 0
    _, H, _, outer_gradient, _ = dense(solver)
    close((H - 2 * curvature * torch.eye(5)) @ rest, -outer_gradient, 1e-5)
    assert set(solver.warnings(metrics)) == {"curvature", "stationarity"}  # the rate is 0
